"""The evaluations of a run: on the way, which decide the policy that is kept, and at the end of each phase."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from acrlpd.agents.agent import ACRLPDAgent, ActingMode
from acrlpd.data.view.transforms import Compose
from acrlpd.envs.rollout import Rollout
from acrlpd.files import written_whole
from acrlpd.training.clocks import Clocks
from acrlpd.training.evaluate import Evaluation, evaluate, outcomes
from acrlpd.training.measuring import subject_of_agent
from acrlpd.training.metrics import write_json
from acrlpd.training.offline_evaluation import PICTURES_PREFIX, HeldOut, OfflineEvaluation
from acrlpd.training.parts import RunParts
from acrlpd.training.phases import Phase
from acrlpd.training.run import RunState, save_rollouts
from acrlpd.training.run_log import RunLog
from acrlpd.training.saving import Saver


class _Evaluated(NamedTuple):
    """A policy to evaluate, with the update and environment step at which it was the newest."""

    agent: ACRLPDAgent
    step: int
    env_steps: int


class Evaluations:
    """The evaluations of a run in its own environment; without one on held-out episodes, if it has any."""

    def __init__(
        self, state: RunState, parts: RunParts, *, rng: PRNGKeyArray, saver: Saver, log: RunLog, clocks: Clocks
    ):
        self._state = state
        self._parts = parts
        self._rng = rng
        self._saver = saver
        self._log = log
        self._clocks = clocks

    def on_the_way(self, phase: Phase) -> None:
        """Evaluate the agent in training on the seeds, or episodes, that decide which policy the run keeps."""
        if self._parts.eval_environments is None:
            if self._parts.held_out is not None:
                self._on_held_out(phase, self._parts.held_out)
            return
        config, progress, step = self._state.config, self._state.progress, self._state.step
        result, rollouts = self._evaluate(phase, "greedy", config.eval.progress_seeds, self._newest_policy())
        tqdm.write(f"{phase}, step {step}: success {result}")
        progress.evaluated_step = step
        if phase == "online":
            progress.count_online_evaluation(result.success)
            self._log.monitor.monitor_evaluation(step, progress.offline_outcomes, outcomes(rollouts))
        elif step >= config.offline_steps:
            progress.offline_outcomes = outcomes(rollouts)
        if result.success >= progress.best_step_success:  # a tie goes to the policy that trained for longer
            self._saver.keep_as_best(success=result.success)

    def _on_held_out(self, phase: Phase, held_out: HeldOut) -> None:
        """Compare the newest policy's actions with those of held-out episodes, and keep the best one.

        The best has the smallest error of the executed steps, as it acts: of the numbers that recorded episodes give,
        it is nearest to what a robot will do. The flow loss has no actions, and Q judges them by itself.
        """
        progress, step, config = self._state.progress, self._state.step, self._state.config
        transform = self._parts.transform
        assert isinstance(transform, Compose), "make_transform returns all steps"
        before = self._clocks.cpu()
        with self._clocks.span("evaluation"):
            found = held_out.evaluate(subject_of_agent(self._state.agent, transform, config), self._rng)
        self._log.write_offline_evaluation(phase, found, cpu_s=self._clocks.cpu() - before)
        tqdm.write(f"{phase}, step {step}: action error {found.score:.3f}, of the better baseline {found.baseline:.3f}")
        progress.evaluated_step = step
        if progress.best_step_error is None or found.score <= progress.best_step_error:
            self._save_held_out(found, held_out)
            self._saver.keep_as_best(action_error=found.score)

    def _save_held_out(self, found: OfflineEvaluation, held_out: HeldOut) -> None:
        files = self._parts.files
        write_json(files.offline_evaluation, {"step": self._state.step, "remarks": []} | found.to_dict())
        course = found.courses[0]
        with written_whole(files.held_out_pictures) as temporary:
            pictures: dict[str, Any] = {PICTURES_PREFIX + name: x for name, x in held_out.pictures(course).items()}
            np.savez_compressed(temporary, episode=course.episode, **pictures)

    def at_the_end(self, phase: Phase, *, is_last: bool) -> None:
        """Evaluate what a phase ends with. After the offline phase, also evaluate the flow without the critic ("bc").

        The result of the last phase is that of the policy that the run keeps.
        """
        if self._parts.eval_environments is None:
            if self._parts.held_out is not None and self._state.progress.evaluated_step != self._state.step:
                self.on_the_way(phase)
            return
        if self._state.progress.evaluated_step != self._state.step:  # else the loop has just done it
            self.on_the_way(phase)
        if phase == "offline":
            self._add_result("bc", "bc", self._newest_policy())
        self._add_result(phase, "greedy", self._kept_policy() if is_last else self._newest_policy())

    def _add_result(self, name: str, mode: ActingMode, policy: _Evaluated) -> None:
        result, rollouts = self._evaluate(name, mode, self._state.config.eval.final_seeds, policy)
        told = {"bc": "imitation alone"}.get(name, f"after the {name} phase")
        tqdm.write(f"{told}, policy of step {policy.step}: success {result}")
        self._state.progress.results[name] = result.summary()
        save_rollouts(self._parts.files.evaluation(name), rollouts)

    def _evaluate(
        self, name: str, mode: ActingMode, seeds: range, policy: _Evaluated
    ) -> tuple[Evaluation, list[Rollout]]:
        assert self._parts.eval_environments is not None, "callers ask first"
        with self._clocks.span("update"):
            jax.block_until_ready(self._state.agent.step)
        before = self._clocks.cpu()
        with self._clocks.span("evaluation"):
            result, rollouts = evaluate(
                policy.agent,
                self._parts.transform,
                self._parts.eval_environments,
                seeds,
                mode=mode,
                rng=self._rng,  # the same noise each time, so two evaluations differ only in their policies
                execute_horizon=self._state.config.executed_steps,
            )
        spent = self._clocks.cpu() - before
        self._log.write_evaluation(name, result, step=policy.step, env_steps=policy.env_steps, cpu_s=spent)
        return result, rollouts

    def _newest_policy(self) -> _Evaluated:
        return _Evaluated(self._state.agent, self._state.step, self._state.progress.env_steps)

    def _kept_policy(self) -> _Evaluated:
        """Return the policy that the run keeps; a restored one has no optimiser state."""
        step = self._state.progress.best_step
        if step is None or step == self._state.step:
            return self._newest_policy()
        acting = dataclasses.replace(self._state.agent, opt_state={})
        restored = self._parts.checkpoints.restore(acting, step)
        return _Evaluated(restored.agent, step, restored.run["progress"]["env_steps"])
