"""What a run does when an update goes wrong: go back, go on with less memory, or save before an error ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import jax
import numpy as np

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.overrides import differences
from acrlpd.training import guards
from acrlpd.training.faults import Diverged, Interrupted, RunFault
from acrlpd.training.guards import SkippedUpdates
from acrlpd.training.parts import RunParts
from acrlpd.training.run import Progress, RunState, settle_best
from acrlpd.training.saving import Saver

logger = logging.getLogger(__name__)


class Recovery:
    """The recovery of a run from divergence, from too little memory, and from errors that nobody foresaw."""

    def __init__(self, state: RunState, parts: RunParts, saver: Saver):
        self.skipped = SkippedUpdates(parts.files.skipped, limit=parts.config.max_skipped_updates)
        self._state = state
        self._parts = parts
        self._saver = saver

    def roll_back_if_diverged(self) -> None:
        """Go back to the newest checkpoint before many skipped updates in a row, or to the start of the run."""
        diverged_at = self.skipped.settle()
        if diverged_at is None:
            return
        config, progress = self._state.config, self._state.progress
        what = (
            f"{config.max_skipped_updates} updates in a row from step {diverged_at} on were skipped for NaN or "
            f"spikes; their episodes are listed in {self._parts.files.skipped}"
        )
        if progress.rollbacks >= config.max_rollbacks:
            raise Diverged(
                f"{what}. {progress.rollbacks} rollbacks did not help: look at those episodes (acrlpd data "
                "validate), lower the learning rates, or raise agent.health.spike_factor."
            )
        earlier = self._restore(before=diverged_at)
        self._parts.checkpoints.discard_after(self._state.step)
        settle_best(progress, earlier, self._parts.checkpoints, self._parts.files)
        progress.rollbacks += 1
        logger.warning("%s. Rolled back to step %d, where other batches and noise are drawn.", what, self._state.step)

    def lighten(self, reason: str) -> None:
        """Go on with smaller micro-batches. If the failed call consumed the agent, restore the last good one."""
        state, before = self._state, self._state.config.agent
        lighter = guards.lighter(before, state.config.data.batch_size, jax.device_count())
        if lighter is None:
            raise RunFault(
                f"out of memory in update {state.step}, and nothing can be made smaller: {reason}. acrlpd plan says "
                "what this run needs; the last checkpoint is intact."
            )
        changes = differences(dataclasses.asdict(before), dataclasses.asdict(lighter), "agent.")
        logger.warning(
            "out of memory in update %d (%s). Going on with %s.",
            *(state.step, reason),
            "; ".join(line.replace(": was", " from").replace(", now", " to") for line in changes),
        )
        state.config = dataclasses.replace(state.config, agent=lighter)
        if _is_consumed(state.agent):
            self._restore(before=state.step)
        self._apply_choices()

    @contextlib.contextmanager
    def save_before_leaving(self) -> Iterator[None]:
        """Save the agent before an unforeseen error leaves the block, such as one of a simulator or a logger."""
        try:
            yield
        except (Interrupted, RunFault):
            raise  # the run was saved before these were raised, or their message says why not
        except Exception as error:
            if not guards.is_of_storage(error, self._parts.files.directory) and jax.process_count() == 1:
                self._try_to_save(error)
            raise

    def _restore(self, *, before: int) -> Progress:
        """Put the newest saved agent up to step ``before``, or a fresh one, in the place of the agent in training.

        Return the run's progress at that time.
        """
        checkpoints = self._parts.checkpoints
        checkpoints.wait()
        if not any(step <= before for step in checkpoints.steps()):
            self._state.replace_agent(self._parts.fresh_agent())
            self._apply_choices()
            return Progress()
        restored = checkpoints.restore_newest(self._state.agent, before=before)
        self._state.replace_agent(restored.agent)
        return Progress(**restored.run["progress"])

    def _apply_choices(self) -> None:
        """Give the agent the run's choices, which became lighter than at its start if it once ran out of memory."""
        nets = dataclasses.replace(self._state.agent.nets, config=self._state.config.agent)
        self._state.agent = dataclasses.replace(self._state.agent, nets=nets)

    def _try_to_save(self, reason: Exception) -> None:
        agent, step = self._state.agent, self._state.step
        try:
            if _is_consumed(agent) or self.skipped.settle() is not None:
                return
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(agent.params)):
                return
            self._saver.save()
            self._saver.wait()
        except Exception:  # the caller raises the first error
            logger.exception("after %r, update %d could not be saved", reason, step)
        else:
            logger.error("%r ends the run; update %d is saved, use --resume.", reason, step)


def _is_consumed(agent: ACRLPDAgent) -> bool:
    """Return whether a call that failed has taken arrays of the agent for its results."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(agent))
