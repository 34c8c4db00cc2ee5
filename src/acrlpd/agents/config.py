"""The configuration of the algorithms: fields and validation only."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from typing import Literal, get_args

from acrlpd.agents.extraction import BestOfN, Distill, Extraction, ExtractionName, GuidedByQ, QGradient, make_own
from acrlpd.agents.health import HealthConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.models.critic import CriticConfig
from acrlpd.named_code import names_code

AlgorithmName = Literal["acrlpd", "bc", "rlpd_ac"]
BCWeighting = Literal["none", "importance", "difficulty"]
BestOfNStrategy = Literal["parallel", "chunked", "sequential", "auto"]


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """The temperature alpha: of the softmax in exploration, and the weight of the entropy bonus under q_gradient."""

    initial_temp: float = 1.0
    target_entropy_multiplier: float = 0.5  # target entropy = -multiplier * horizon * action_dim
    adaptive: bool = True

    def __post_init__(self):
        if not 0 < self.initial_temp < math.inf:
            raise ValueError(f"temperature.initial_temp must be positive, got {self.initial_temp}")
        if not math.isfinite(self.target_entropy_multiplier):  # negative is fine: differential entropy has both signs
            raise ValueError(
                f"temperature.target_entropy_multiplier must be finite, got {self.target_entropy_multiplier}"
            )


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The choices of an algorithm, with its critics. Sizes of the policy are in ``PolicyConfig``."""

    algorithm: AlgorithmName = "acrlpd"  # the module of agents/ that has the loss; bc and rlpd_ac are baselines
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    temperature: TemperatureConfig = dataclasses.field(default_factory=TemperatureConfig)
    loss_weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    extraction: str = "best_of_n"  # or q_gradient, distill, guided, or FILE.py:NAME: code of your own
    discount: float = 0.99
    target_update_tau: float = 0.005
    act_by_target_critic: bool = True  # if there are no moving averages, target critics choose while acting
    policy_ema_decay: float | None = None  # decay of the moving average of flow and critics that acts; None: none
    gradient_accumulation_steps: int = 1  # micro-batches per update; more of them need less activation memory
    best_of_n_samples: int = 32  # candidates while acting
    target_samples: int | None = None  # candidates in the TD target; None: best_of_n_samples
    best_of_n_strategy: BestOfNStrategy = "auto"
    best_of_n_block: int = 8  # candidates at a time under "chunked"
    best_of_n_bytes: int = 2 * 1024**3  # "auto": candidates at a time fit in this and, on a CPU, in its cache
    top_k: int | None = None  # explore among this many best candidates; None: among all
    diversity_bonus: float = 0.0  # added to Q while exploring, times the mean distance to the other candidates
    flow_steps: int = 10  # Euler steps while acting
    candidate_flow_steps: int | None = None  # rank candidates after these few steps, then redo the best; None: no redo
    target_flow_steps: int | None = None  # Euler steps in the TD target; None: flow_steps
    action_clip: float | None = None  # candidates are clipped to +- this, in normalized units
    huber_delta: float | None = None  # None: squared TD error
    actor_samples: int = 2  # q_gradient: chunks per observation; 1 switches the entropy bonus off
    distill_weight: float = 100.0  # distill: weight of the distance to the flow, relative to Q
    guidance_weights: tuple[float, ...] = (1.0,)  # guided: weights of Q's gradient, candidates take them in turn
    target_guidance: bool = False  # guided: guide the candidates in the TD target, too
    bc_weighting: BCWeighting = "none"
    bc_weighting_temperature: float = 1.0
    bc_weighting_bound: float = 4.0  # max ratio of two weights in a batch
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self):
        for name, choices in (
            ("algorithm", AlgorithmName),
            ("best_of_n_strategy", BestOfNStrategy),
            ("bc_weighting", BCWeighting),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"agent.{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if self.extraction not in get_args(ExtractionName) and not names_code(self.extraction):
            near = difflib.get_close_matches(self.extraction, get_args(ExtractionName), n=1)
            raise ValueError(
                f"agent.extraction must be one of {get_args(ExtractionName)} or FILE.py:NAME, got {self.extraction!r}"
                + (f": did you mean {near[0]!r}?" if near else "")
            )
        if not 0 < self.discount <= 1:
            raise ValueError(f"agent.discount must lie in (0, 1], got {self.discount}")
        if not 0 < self.target_update_tau <= 1:
            raise ValueError(f"agent.target_update_tau must lie in (0, 1], got {self.target_update_tau}")
        if self.policy_ema_decay is not None and not 0 < self.policy_ema_decay < 1:
            raise ValueError(f"agent.policy_ema_decay must lie in (0, 1), got {self.policy_ema_decay}")
        counts = ("best_of_n_samples", "target_samples", "flow_steps", "target_flow_steps", "candidate_flow_steps")
        for name in (*counts, "best_of_n_block", "best_of_n_bytes", "top_k", "actor_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"agent.{name} must be at least 1, got {value}")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"agent.gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}"
            )
        for name in ("huber_delta", "action_clip", "bc_weighting_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"agent.{name} must be positive, got {value}")
        for name in ("diversity_bonus", "distill_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"agent.{name} must not be negative, got {getattr(self, name)}")
        if not self.guidance_weights or not all(0 <= weight < math.inf for weight in self.guidance_weights):
            raise ValueError(
                f"agent.guidance_weights must be one or more numbers that are not negative, got {self.guidance_weights}"
            )
        if not 1 <= self.bc_weighting_bound < math.inf:
            raise ValueError(f"agent.bc_weighting_bound must be at least 1, got {self.bc_weighting_bound}")
        if self.extraction == "distill" and self.candidate_flow_steps is not None:
            raise ValueError(
                "agent.candidate_flow_steps has no effect with extraction='distill': a student's candidate takes one "
                "step. Leave it out."
            )
        if self.algorithm == "acrlpd" and self.temperature.adaptive and self.candidates_in_target < 2:
            raise ValueError(
                "agent.temperature.adaptive needs the spread of at least 2 candidates, but the TD target draws "
                f"{self.candidates_in_target}: raise agent.target_samples or set agent.temperature.adaptive to False"
            )

    @property
    def candidates_in_target(self) -> int:
        return self.best_of_n_samples if self.target_samples is None else self.target_samples

    @property
    def steps_in_target(self) -> int:
        return self.flow_steps if self.target_flow_steps is None else self.target_flow_steps

    @property
    def actor_draws(self) -> int:
        """The number of chunks per observation in the actor loss."""
        return 1 if self.extraction in ("best_of_n", "distill", "guided") else self.actor_samples

    @property
    def in_target(self) -> AgentConfig:
        """The choices for the candidates in the TD target, which are plain samples unless ``target_guidance``."""
        plain = self.extraction == "guided" and not self.target_guidance
        return dataclasses.replace(self, extraction="best_of_n") if plain else self

    def weights_of_candidates(self, n: int) -> tuple[float, ...] | None:
        """Return the guidance weight of each of n candidates, which take the weights in turn; None if not guided."""
        if self.extraction != "guided":
            return None
        return tuple(itertools.islice(itertools.cycle(self.guidance_weights), n))

    def with_extraction(self, name: str | None, guidance_weights: tuple[float, ...] | None = None) -> AgentConfig:
        """Return the choices with another extraction, or with other guidance weights; None: as they are.

        Raises:
            ValueError: there is no such extraction, or it is not guided and there are weights for it.
        """
        extraction = self.extraction if name is None else name
        if guidance_weights is None:
            return dataclasses.replace(self, extraction=extraction)
        if extraction != "guided":
            raise ValueError(
                f"guidance_weights {guidance_weights} have no effect with extraction {extraction!r}: they need "
                "--extraction guided"
            )
        return dataclasses.replace(self, extraction=extraction, guidance_weights=guidance_weights)

    def make_extraction(self, num_steps: int) -> Extraction:
        if self.extraction == "q_gradient":
            return QGradient(num_steps, self.action_clip)
        if self.extraction == "distill":
            return Distill(num_steps, self.action_clip, self.distill_weight)
        if self.extraction == "guided" and any(self.guidance_weights):
            return GuidedByQ(num_steps, self.action_clip)
        if self.extraction in ("best_of_n", "guided"):
            return BestOfN(num_steps, self.action_clip)
        return make_own(self.extraction, num_steps, self.action_clip)
