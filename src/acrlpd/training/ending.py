"""The reasons why a run ended, as the terminal, ``summary.json`` and the report give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from acrlpd.config import TrainConfig
from acrlpd.files import read_json
from acrlpd.training.clocks import breakdown
from acrlpd.training.faults import Interrupted
from acrlpd.training.run import Progress, RunFiles, RunState


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a run. ``rule`` is the configuration field by which early stopping ended it."""

    reason: Literal["finished", "early stop", "interrupted", "crashed"]
    text: str
    rule: str | None = None


OVER = ("finished", "early stop")  # reasons after which --resume changes nothing


def early_stop(config: TrainConfig, progress: Progress) -> Ended | None:
    """Return the early stop of an online run, or None. Nothing counts before an online evaluation succeeds once."""
    best, since = progress.best_success, progress.evaluations_since_best
    if best <= 0:
        return None
    enough, patience = config.early_stopping_success, config.early_stopping_patience
    if enough is not None and best >= enough:
        text = f"an online evaluation reached {best:.0%}, and early_stopping_success is {enough:.0%}"
        return Ended("early stop", f"stopped early: {text}", "early_stopping_success")
    if since >= patience:
        text = f"{since} online evaluations after the best one ({best:.0%}) were no better"
        return Ended(
            "early stop", f"stopped early: {text}, and early_stopping_patience is {patience}", "early_stopping_patience"
        )
    return None


def online_is_over(config: TrainConfig, progress: Progress) -> bool:
    """Return whether the online phase has ended, evaluation included, and should not continue."""
    is_long_enough = progress.counted_steps >= config.online_steps or early_stop(config, progress) is not None
    return "online" in progress.finished and is_long_enough


def is_over(config: TrainConfig, progress: Progress, updates: int) -> Ended | None:
    """Return why a run of this configuration has nothing left to do; None if something is left."""
    if config.offline_steps and not ("offline" in progress.finished and updates >= config.offline_steps):
        return None
    if config.env is None or not config.online_steps:
        return Ended("finished", f"finished: {config.offline_steps:,} offline updates")
    if not online_is_over(config, progress):
        return None
    if progress.counted_steps < config.online_steps:
        return early_stop(config, progress)
    steps = f"{progress.counted_steps:,} online steps of {config.online_steps:,}"
    return Ended("finished", f"finished: {config.offline_steps:,} offline updates, {steps}")


def cut_short(error: Exception, updates: int) -> Ended:
    """Return the end of a run that a signal or an error cut short."""
    if isinstance(error, Interrupted):
        return Ended("interrupted", f"was interrupted at update {updates:,}; --resume goes on")
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Ended("crashed", f"crashed at update {updates:,} ({reason}); --resume goes on from the last checkpoint")


def summarize(state: RunState, ended: Ended, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``summary.json`` says of a run with the prior ``data``; its clocks are settled."""
    config, progress = state.config, state.progress
    return {
        "task": config.env.name if config.env else config.data.name,
        "seed": config.seed,
        "data": data,
        "phases": progress.results,
        "wall_s": progress.wall_s,
        "cpu_s": progress.cpu_s,
        "updates": state.step,
        "env_steps": progress.env_steps,
        "lost_steps": progress.lost_steps,
        "ended": dataclasses.asdict(ended),
        "best": {"step": progress.best_step} | progress.best_score,
        "rollbacks": progress.rollbacks,
        "lost_episodes": progress.lost_episodes,
        "breakdown": breakdown(progress.seconds, progress.wall_s),
    }


def known_summary(files: RunFiles, progress: Progress, updates: int) -> dict[str, Any] | None:
    """Return the summary of a run that is over with these counters; None if there is none or it does not fit."""
    try:
        summary = read_json(files.summary, allow_nan=True)
        reason = summary["ended"]["reason"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # it will be written again
        return None
    counters = {"updates": updates, "env_steps": progress.env_steps, "phases": progress.results}
    return summary if reason in OVER and all(summary.get(key) == value for key, value in counters.items()) else None
