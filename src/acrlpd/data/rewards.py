"""Rewards and terminals of a recorded episode, from what its format says about success.

Three things are kept apart: where an episode ends (its bounds, never a ``done`` column), whether it succeeded (true,
false, or nobody knows), and where the task ended (``terminals``). A time limit or a stopped recording ends an episode
without a terminal.

A worked example: five steps, the task is done at step 3 and the recorder runs on for one more.

    stored, 0/1      0  0  0  1  1      terminals at 3 and 4: what is done after a success earns nothing more
    stored, -1/0    -1 -1 -1  0  0
    sparse, 0/1      0  0  0  0  1      terminal at 4: success counts at the end of the recording, nothing is cut
    sparse, -1/0    -1 -1 -1 -1  0

With the convention ``as_stored`` rewards keep their numbers: for dense or shaped ones, which have no such reading.
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
    # -1/0 is 0/1 minus one: every step costs, the one that succeeds is free. as_stored: dense rewards, unchanged
    convention: Literal["0/1", "-1/0", "as_stored"] = "-1/0"
    success: bool | None = None  # your word for the episodes of which the format does not say how they ended
    terminal_on_failure: bool = (
        False  # failing ends the task, so nothing is bootstrapped past it; a time limit does not
    )
    success_reward: float | None = None  # stored reward from which on the task is done; needed for staged rewards

    def __post_init__(self):
        if self.source not in ("stored", "sparse"):
            raise ValueError(f"source must be 'stored' or 'sparse', got {self.source!r}")
        if self.convention not in ("0/1", "-1/0", "as_stored"):
            raise ValueError(f"convention must be '0/1', '-1/0' or 'as_stored', got {self.convention!r}")
        if self.source == "sparse" and self.convention == "as_stored":
            raise ValueError("rewards.source 'sparse' makes rewards; the convention 'as_stored' keeps those stored")


def are_known(config: RewardConfig | None, stored: Iterable[np.ndarray]) -> bool:
    """Whether the stored rewards of a data set say anything.

    Zeros throughout are what recorders and converters write that know of none; only success can then tell.
    """
    return (config is not None and config.convention == "as_stored") or any(np.any(rewards) for rewards in stored)


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


def believes_terminals(config: RewardConfig | None) -> bool:
    """Whether stored terminals decide, so that nothing is guessed from rewards; the user's ``success_reward`` wins."""
    return config is None or config.success_reward is None


@typed
def label(
    config: RewardConfig | None,
    length: int,
    *,
    success: bool | None,
    stored: Float[np.ndarray, " t"] | None = None,
    terminals: Bool[np.ndarray, " t"] | None = None,
    threshold: float | None = None,
    where: str,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Rewards and terminals of an episode of ``length`` steps.

    Args:
        config: None leaves rewards as they are stored, and 0 where none are: good for imitation only.
        success: as ``success_of`` found it.
        stored: the rewards the format holds for the episode, if it does; see ``are_known``.
        terminals: where the format itself says the task ended, if it does; see ``believes_terminals``.
        threshold: as ``success_reward`` found it for the data set.
        where: the episode (and file), for messages.

    Raises:
        ValueError: rewards are asked for, and nobody says whether the episode succeeded, or what its rewards mean.
    """
    last = np.arange(length) == length - 1
    kept, own = (stored, terminals) if config is None or config.source == "stored" else (None, None)
    own = own if believes_terminals(config) else None
    reached = None if kept is None or threshold is None else kept >= threshold
    guessed = own is None and (config is None or config.success_reward is None)
    if reached is not None and guessed and success is False and reached.any():
        reached = None  # a stage of the task, not its end
    unchanged = config is None or config.convention == "as_stored"
    if kept is None and config is not None and unchanged:
        raise _nothing_stored(where)
    if kept is not None and reached is None and not unchanged:
        raise _unknown_meaning(where, kept, success)
    if kept is not None and own is not None:
        done = own
    elif reached is not None:
        done = reached
    elif success is None and config is not None:
        raise unknown_success(where)
    else:
        done = own if own is not None and own.any() else last & bool(success)
    if config is None:
        return (np.zeros(length, np.float32) if kept is None else kept), done
    ends = last if config.terminal_on_failure and not done.any() else done
    if kept is not None and unchanged:
        return kept, ends
    succeeded = done & bool(success) if reached is None else reached
    return succeeded.astype(np.float32) - (1 if config.convention == "-1/0" else 0), ends


def unknown_success(where: str) -> ValueError:
    return ValueError(
        f"{where}: success: rewards were asked for, but nothing in the data says whether the episode succeeded. State "
        "it: --data.rewards.success True if all such episodes succeeded, False if none did (from Python "
        "RewardConfig(success=True))."
    )


def _unknown_meaning(where: str, stored: np.ndarray, success: bool | None) -> ValueError:
    failed = " in an episode that did not succeed" if success is False else ""
    return ValueError(
        f"{where}: rewards: expected 0 and 1 (or -1 and 0), found shaped or staged rewards up to "
        f"{stored.max():g}{failed}. "
        "Name the one that means success, as in --data.rewards.success_reward 4, keep them as they are with "
        "--data.rewards.convention as_stored, or make sparse ones with --data.rewards.source sparse (from Python "
        "RewardConfig(success_reward=4.0) and so on)."
    )


def _nothing_stored(where: str) -> ValueError:
    return ValueError(
        f"{where}: rewards: expected stored ones (convention 'as_stored'), found none. Have them made from success: "
        "--data.rewards.convention -1/0 or 0/1."
    )
