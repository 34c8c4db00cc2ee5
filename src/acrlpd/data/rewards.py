"""Rewards and terminals of a recorded episode, from what its format says about success.

Three things are kept apart: where an episode ends (its bounds, never a ``done`` column), whether it succeeded (true,
false, or nobody knows), and where the task ended (``terminals``). A time limit or a stopped recording ends an episode
without a terminal.

A worked example: five steps, the task is done at step 3 and the recorder runs on for one more.

    stored, 0/1      0  0  0  1  1      terminals at 3 and 4: what is done after a success earns nothing more
    stored, -1/0    -1 -1 -1  0  0
    sparse, 0/1      0  0  0  0  1      terminal at 4: success counts at the end of the recording, nothing is cut
    sparse, -1/0    -1 -1 -1 -1  0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from acrlpd.types import typed


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Which rewards to give recorded episodes. A reader that is given none leaves stored rewards as they are."""

    source: Literal["stored", "sparse"] = "stored"  # sparse: always from success. stored: so where none are stored
    convention: Literal["0/1", "-1/0"] = (
        "-1/0"  # -1/0 is 0/1 minus one: every step costs, the one that succeeds is free
    )
    success: bool | None = None  # your word for the episodes of which the format does not say how they ended
    terminal_on_failure: bool = (
        False  # failing ends the task, so nothing is bootstrapped past it; a time limit does not
    )
    success_reward: float | None = None  # stored reward from which on the task is done; needed for staged rewards

    def __post_init__(self):
        if self.source not in ("stored", "sparse"):
            raise ValueError(f"source must be 'stored' or 'sparse', got {self.source!r}")
        if self.convention not in ("0/1", "-1/0"):
            raise ValueError(f"convention must be '0/1' or '-1/0', got {self.convention!r}")


def success_reward(config: RewardConfig | None, stored: Iterable[np.ndarray]) -> float | None:
    """The stored reward from which on a step counts as a success; None where nobody can tell.

    The user's word first; else 1 for rewards of 0 and 1, and 0 for rewards of -1 and 0. ``stored`` holds the rewards of
    all episodes of a data set, for one alone would mislead: a staged episode that fails early shows only 0 and 1.
    """
    if config is not None and config.success_reward is not None:
        return config.success_reward
    values: set[float] = set()
    for rewards in stored:
        values.update(np.unique(rewards).tolist())
        if not values <= {-1.0, 0.0, 1.0}:
            return None
    if values <= {0.0, 1.0}:
        return 1.0
    return 0.0 if values <= {-1.0, 0.0} else None


def success_of(
    config: RewardConfig | None, recorded: bool | None, stored: np.ndarray | None = None, threshold: float | None = None
) -> bool | None:
    """Whether an episode succeeded, from the first source that knows; None where nobody does.

    Sources: what the format says (``recorded``), its rewards reaching ``threshold`` (see ``success_reward``), the user.
    """
    if recorded is not None:
        return recorded
    if stored is not None and threshold is not None:
        return bool((stored >= threshold).any())
    return config.success if config is not None else None


@typed
def label(
    config: RewardConfig | None,
    length: int,
    *,
    success: bool | None,
    stored: Float[np.ndarray, " t"] | None = None,
    threshold: float | None = None,
    where: str,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Rewards and terminals of an episode of ``length`` steps.

    Args:
        config: None leaves rewards as they are stored, and 0 where none are: good for imitation only.
        success: as ``success_of`` found it.
        stored: the rewards the format holds for the episode, if it does.
        threshold: as ``success_reward`` found it for the data set.
        where: the episode (and file), for messages.

    Raises:
        ValueError: rewards are asked for, and nobody says whether the episode succeeded, or what its rewards mean.
    """
    last = np.arange(length) == length - 1
    if stored is not None and (config is None or config.source == "stored"):
        if threshold is not None:
            done = stored >= threshold
        elif config is None:
            done = last & bool(success)
        else:
            raise _unknown_meaning(where, stored)
    elif success is None and config is not None:
        raise unknown_success(where)
    else:
        done = last & bool(success)
    if config is None:
        return (np.zeros(length, np.float32) if stored is None else stored), done
    rewards = done.astype(np.float32) - (1 if config.convention == "-1/0" else 0)
    return rewards, last if config.terminal_on_failure and not done.any() else done


def unknown_success(where: str) -> ValueError:
    return ValueError(
        f"{where}: success: rewards were asked for, but nothing in the data says whether the episode succeeded. State "
        "it: RewardConfig(success=True) if all such episodes succeeded, RewardConfig(success=False) if none did."
    )


def _unknown_meaning(where: str, stored: np.ndarray) -> ValueError:
    return ValueError(
        f"{where}: rewards: expected 0 and 1 (or -1 and 0), found shaped or staged rewards up to {stored.max():g}. "
        "Name the one that means success, as in RewardConfig(success_reward=4.0), or make sparse rewards with "
        "RewardConfig(source='sparse')."
    )
