"""The two phases of a run: how long each is, how much of it is done, and what is due next.

Everything here is computed from the configuration and the counters, so a resumed run finds the same.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from acrlpd.agents.losses import LossWeights
from acrlpd.config import TrainConfig
from acrlpd.training import ending
from acrlpd.training.run import RunState

Phase = Literal["offline", "online"]
PHASES: tuple[Phase, ...] = ("offline", "online")


def extent(state: RunState, phase: Phase) -> tuple[int, int]:
    """Return the length of a phase and how much of it is done: updates offline, environment steps online."""
    config = state.config
    if phase == "offline":
        return config.offline_steps, min(state.step, config.offline_steps)
    total = config.online_steps if config.env is not None else 0
    return total, min(state.progress.counted_steps, total)


def is_finished(state: RunState, phase: Phase) -> bool:
    """Return whether a phase has made all its updates and steps, or has stopped early."""
    total, done = extent(state, phase)
    if phase == "offline" or not total:
        return done >= total
    return ending.early_stop(state.config, state.progress) is not None or (done >= total and updates_owed(state) < 1)


def is_done(state: RunState, phase: Phase) -> bool:
    """Return whether nothing of a phase is left to do: it is empty, or it was finished and its results are saved."""
    was_ended = phase in state.progress.finished and is_finished(state, phase)
    return extent(state, phase)[0] == 0 or was_ended


def is_last(state: RunState, phase: Phase) -> bool:
    """Return whether the run ends with this phase."""
    return phase == "online" or extent(state, "online")[0] == 0


def updates_owed(state: RunState) -> float:
    """Return the number of updates that ``utd_ratio`` requires and that have not been made."""
    config = state.config
    due = (state.progress.counted_steps - config.warmup_env_steps) * config.utd_ratio
    return due - (state.step - config.offline_steps)


def updates_at_once(state: RunState, phase: Phase) -> int:
    """Return ``updates_per_call`` if nothing is due in between these updates, else 1."""
    config = state.config
    if state.step < config.critic_alone_steps:
        return 1
    frequencies = (config.log_frequency, config.save_frequency, evaluation_frequency(config, phase))
    due = [frequency - state.step % frequency for frequency in frequencies]
    due.append(config.offline_steps - state.step if phase == "offline" else int(updates_owed(state)))
    return config.updates_per_call if config.updates_per_call <= min(due) else 1


def evaluation_frequency(config: TrainConfig, phase: Phase) -> int:
    """Return the number of updates between two evaluations on the way, half as many online."""
    return max(1, config.eval.frequency // (2 if phase == "online" else 1))


def loss_weights(config: TrainConfig, step: int) -> LossWeights:
    """Return the loss weights of an update: no actor loss at first, a linear change early in the online phase."""
    weights = config.agent.loss_weights
    if config.online_loss_weights is not None and step >= config.offline_steps:
        share = min(1.0, (step - config.offline_steps) / config.online_transition_steps)
        weights = jax.tree.map(lambda a, b: a + share * (b - a), weights, config.online_loss_weights)
    if step < config.actor_warmup_steps:
        weights = dataclasses.replace(weights, actor_weight=0.0)
    return weights
