"""Saving of a run: its checkpoints, and which of them holds the best policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from acrlpd.config import to_dict
from acrlpd.training.checkpoint import checksums
from acrlpd.training.clocks import Clocks
from acrlpd.training.parts import RunParts
from acrlpd.training.run import RunState


class Saver:
    """The one that saves a run. Training goes on while a checkpoint is written."""

    def __init__(self, state: RunState, parts: RunParts, clocks: Clocks):
        self._state = state
        self._parts = parts
        self._clocks = clocks
        self._replaced = parts.replaced
        self._has_saved = False

    def save(self) -> None:
        """Start saving a checkpoint of the current state. The first one completes before the run it replaces goes."""
        agent, checkpoints = self._state.agent, self._parts.checkpoints
        with self._clocks.span("update"):
            jax.block_until_ready(agent.step)
        if not self._has_saved:
            with self._clocks.span("compile"):
                checksums(agent)
            self._has_saved = True
        with self._clocks.span("checkpoint"):
            self._clocks.settle()
            checkpoints.save(
                agent,
                asset_id=self._state.config.asset_id,
                norm_stats=self._parts.norm_stats,
                run=self._record(),
            )
            if self._replaced is not None:
                checkpoints.wait()
                self._replaced.delete()
                self._replaced = None

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        self._parts.checkpoints.wait()

    def save_progress(self) -> None:
        """Replace the counters in the checkpoint of this step, which is there already."""
        with self._clocks.span("checkpoint"):
            self._clocks.settle()
            self._parts.checkpoints.replace_run(self._state.step, self._record())

    def keep_as_best(self, *, success: float | None = None, action_error: float | None = None) -> None:
        """Keep this checkpoint. The previous best is released once this one is complete and ``best.json`` names it."""
        progress, checkpoints = self._state.progress, self._parts.checkpoints
        before = progress.best_step
        progress.best_step = self._state.step
        if success is not None:
            progress.best_step_success = success
        progress.best_step_error = action_error
        checkpoints.keep.add(self._state.step)
        self.save()
        with self._clocks.span("checkpoint"):
            checkpoints.wait()
        self._parts.files.write_best(progress)
        checkpoints.release(before)

    def _record(self) -> dict[str, Any]:
        prior = self._parts.prior
        return {
            "config": to_dict(self._state.config),
            "progress": dataclasses.asdict(self._state.progress),
            "cameras": list(self._parts.loader.cameras),
            "sets": self._parts.loader.contents().get("sets", []),
            "fps": self._parts.fps,
            "prior": None if prior is None else dataclasses.asdict(prior),
        }
