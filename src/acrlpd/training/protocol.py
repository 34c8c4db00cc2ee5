"""The full evaluation of a policy: success, robustness, what best of N adds, and whether the critic is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from acrlpd import fields
from acrlpd.agents.agent import ACRLPDAgent, ActingMode
from acrlpd.data.view.transforms import Transform
from acrlpd.envs.rollout import Rollout
from acrlpd.envs.vector import VectorEnv
from acrlpd.fields import NonNegativeFloat, PositiveFloat, PositiveInt
from acrlpd.training.agreement import Agreement, Choice, agreement
from acrlpd.training.comparison import Comparison, compare
from acrlpd.training.evaluate import Evaluation, evaluate


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """The trials beside the task itself.

    Every trial uses the same seeds, with the same draws for each, so trials can be compared episode by episode.
    """

    # deviations in normalized units, on state and pictures
    observation_noise: tuple[PositiveFloat, ...] = (0.01, 0.05, 0.1)
    action_noise: tuple[PositiveFloat, ...] = (0.01, 0.05, 0.1)  # likewise, on every executed action
    best_of_n: tuple[PositiveInt, ...] = (1, 4, 16, 32)  # numbers of candidates
    # each for all candidates; of agents that are guided
    guidance_weights: tuple[NonNegativeFloat, ...] = (0.0, 0.3, 1.0, 3.0)

    def __post_init__(self) -> None:
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One evaluation over all seeds."""

    evaluation: Evaluation
    rollouts: Sequence[Rollout]


@dataclasses.dataclass(frozen=True)
class Findings:
    """All trials of one policy. ``against_task`` compares a disturbed trial with the undisturbed one."""

    task: Trial
    observation_noise: Mapping[float, Trial]
    action_noise: Mapping[float, Trial]
    best_of_n: Mapping[int, Trial]
    guidance: Mapping[float, Trial]  # by weight; empty unless the extraction is guided
    agreement: Agreement | None  # None: imitation alone has no critic

    def against_task(self, trial: Trial) -> Comparison:
        return compare(self.task.rollouts, trial.rollouts)

    def metrics(self) -> dict[str, float]:
        """Return flat metrics with the founding design's names; what the episodes do not determine is left out."""
        named = {f"robustness/obs_noise_{level}": trial for level, trial in self.observation_noise.items()}
        named |= {f"robustness/action_noise_{level}": trial for level, trial in self.action_noise.items()}
        named |= {f"robustness/best_of_{n}": trial for n, trial in self.best_of_n.items()}
        named |= {f"robustness/guidance_{weight}": trial for weight, trial in self.guidance.items()}
        found = {name: trial.evaluation.return_mean for name, trial in named.items()}
        found |= {f"{name}_success_rate": trial.evaluation.success for name, trial in named.items()}
        facts = self.agreement.to_dict() if self.agreement else {}
        found |= {f"agreement/{name}": value for name, value in facts.items() if isinstance(value, (int, float))}
        return self.task.evaluation.metrics() | found

    def to_dict(self) -> dict[str, Any]:
        """Return for JSON each trial with its interval, disturbed ones with a paired difference, and every episode."""
        disturbed: dict[str, Mapping[Any, Trial]] = {
            "observation_noise": self.observation_noise,
            "action_noise": self.action_noise,
            "best_of_n": self.best_of_n,
            "guidance": self.guidance,
        }
        return {
            "task": self.task.evaluation.to_dict(),
            **{
                kind: {
                    str(level): {**trial.evaluation.to_dict(), "against_task": self.against_task(trial).to_dict()}
                    for level, trial in trials.items()
                }
                for kind, trials in disturbed.items()
            },
            "agreement": self.agreement.to_dict() if self.agreement else None,
            "episodes": [
                {name: getattr(each, name) for name in ("seed", "success", "returns", "length", "error")}
                for each in self.task.rollouts
            ],
        }


class ACRLPDEvaluationProtocol:
    """Evaluation of agents on one task, always on the same seeds.

    ``run`` does everything; its parts can be called alone. ``evaluation_history`` keeps the metrics of every
    ``run_comprehensive_evaluation``, by the step it was given.
    """

    def __init__(
        self,
        config: ProtocolConfig,
        environments: VectorEnv,
        transform: Transform,
        seeds: Sequence[int],
        *,
        execute_horizon: int,
        mode: ActingMode = "greedy",
        seed: int = 0,
    ):
        self.config = config
        self.evaluation_history: list[tuple[int, dict[str, float]]] = []
        self._environments = environments
        self._transform = transform
        self._seeds = seeds
        self._execute_horizon = execute_horizon
        self._mode = mode
        self._seed = seed

    def run_comprehensive_evaluation(self, agent: ACRLPDAgent, step: int) -> dict[str, float]:
        metrics = self.run(agent).metrics()
        self.evaluation_history.append((step, metrics))
        return metrics

    def run(self, agent: ACRLPDAgent) -> Findings:
        task, choices = self.evaluate_task_performance(agent)
        observation_noise, action_noise = self.evaluate_robustness(agent)
        return Findings(
            task=task,
            observation_noise=observation_noise,
            action_noise=action_noise,
            best_of_n=self.analyze_best_of_n_performance(agent),
            guidance=self.analyze_guidance(agent),
            agreement=self.check_pi0_critic_consistency(agent, task, choices),
        )

    def evaluate_task_performance(self, agent: ACRLPDAgent) -> tuple[Trial, dict[int, list[Choice]]]:
        """Evaluate the task as it is; return also the values of all chosen chunks by the number of their episode."""
        choices: dict[int, list[Choice]] = {}

        def note(numbers: Int[np.ndarray, " n"], values: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> None:
            for row, number in enumerate(numbers.tolist()):
                if number >= 0 and values:
                    choice = Choice(**{name: float(values[name][row]) for name in ("q", "q_mean", "q_std")})
                    choices.setdefault(number, []).append(choice)

        return self._trial(agent, on_choice=note), choices

    def evaluate_robustness(self, agent: ACRLPDAgent) -> tuple[dict[float, Trial], dict[float, Trial]]:
        """Evaluate with noise on what the policy sees, and with noise on what it does."""
        observation_noise = {
            level: self._trial(agent, observation_noise=level) for level in self.config.observation_noise
        }
        return observation_noise, {level: self._trial(agent, action_noise=level) for level in self.config.action_noise}

    def analyze_best_of_n_performance(self, agent: ACRLPDAgent) -> dict[int, Trial]:
        """Evaluate the best of more and more candidates by the critic; 1 is the policy without the critic's choice."""
        return {n: self._trial(agent, mode="greedy", num_samples=n) for n in self.config.best_of_n}

    def analyze_guidance(self, agent: ACRLPDAgent) -> dict[float, Trial]:
        """Evaluate how strongly Q's gradient should guide samples; 0 is best of N alone."""
        if not agent.chooses or agent.config.extraction != "guided":
            return {}
        weights = self.config.guidance_weights
        return {each: self._trial(agent.with_extraction(None, (each,)), mode="greedy") for each in weights}

    def check_pi0_critic_consistency(
        self, agent: ACRLPDAgent, task: Trial, choices: Mapping[int, Sequence[Choice]]
    ) -> Agreement | None:
        if not choices:
            return None
        return agreement(task.rollouts, choices, discount=agent.config.discount, execute_horizon=self._execute_horizon)

    def _trial(self, agent: ACRLPDAgent, *, mode: ActingMode | None = None, **options: Any) -> Trial:
        result, rollouts = evaluate(
            agent,
            self._transform,
            self._environments,
            self._seeds,
            mode=mode or self._mode,
            rng=jax.random.key(self._seed),
            execute_horizon=self._execute_horizon,
            **options,
        )
        return Trial(result, rollouts)
