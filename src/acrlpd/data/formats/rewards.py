"""Rewards and terminals of a recorded episode, derived from what its format says about success.

Three facts are kept separate: where an episode ends (its bounds, never a ``done`` column), whether it succeeded (true,
false, or unknown), and where the task ended (``terminals``). A time limit or a stopped recording ends an episode
without a terminal.

A worked example: five steps; the task is done at step 3, and the recorder runs for one more step.

    stored, 0/1      0  0  0  1  1      terminals at 3 and 4: nothing after a success adds to the return
    stored, -1/0    -1 -1 -1  0  0
    sparse, 0/1      0  0  0  0  1      terminal at 4: success counts at the end of the recording, nothing is cut
    sparse, -1/0    -1 -1 -1 -1  0

With the convention ``as_stored`` rewards keep their numbers, for dense or shaped rewards without such a meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from acrlpd import fields
from acrlpd.types import typed


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The choice of rewards for recorded episodes. A reader without one keeps stored rewards as they are."""

    source: Literal["stored", "sparse"] = "stored"  # sparse: from success. stored: from success if none are stored
    # -1/0 is 0/1 minus one: every step costs 1, the one that succeeds is free. as_stored: dense rewards, unchanged
    convention: Literal["0/1", "-1/0", "as_stored"] = "-1/0"
    success: bool | None = None  # the user's statement for the episodes whose success the format does not state
    # a failure ends the task, so nothing is bootstrapped past it; a time limit does not
    terminal_on_failure: bool = False
    success_reward: float | None = None  # min stored reward of a step at which the task is done, for staged rewards

    def __post_init__(self):
        fields.check(self)
        if self.source == "sparse" and self.convention == "as_stored":
            raise ValueError("rewards.source 'sparse' makes rewards; the convention 'as_stored' keeps those stored")


@dataclasses.dataclass(frozen=True)
class Labeller:
    """The way in which all episodes of a data set get their success, rewards and terminals.

    Without a ``config`` rewards stay as stored, and are 0 if there are none: good for imitation only.
    """

    config: RewardConfig | None
    threshold: float | None  # min stored reward of a step at which the task is done; None if it is unknown
    are_known: bool  # False if all stored rewards are 0, which recorders and converters also write for "unknown"

    @classmethod
    def of(cls, config: RewardConfig | None, stored: Sequence[np.ndarray]) -> Labeller:
        """Return the labeller of a data set with these stored rewards (or their different values) of all its episodes.

        One episode alone could mislead: a staged one that fails early has only 0 and 1.
        """
        as_stored = config is not None and config.convention == "as_stored"
        return cls(config, _threshold(config, stored), as_stored or any(np.any(rewards) for rewards in stored))

    @property
    def _believes_terminals(self) -> bool:
        """Whether stored terminals decide, with no guess from rewards; the user's ``success_reward`` wins."""
        return self.config is None or self.config.success_reward is None

    def success(
        self, recorded: bool | None, stored: np.ndarray | None = None, *, has_terminals: bool = False
    ) -> bool | None:
        """Return whether an episode succeeded, from the first source that knows; None if none does.

        Sources: the format (``recorded``), its rewards reaching the threshold (unless terminals decide), the user.
        """
        if recorded is not None:
            return recorded
        if stored is not None and self.threshold is not None and not (has_terminals and self._believes_terminals):
            return bool((stored >= self.threshold).any())
        return None if self.config is None else self.config.success

    @typed
    def label(
        self,
        length: int,
        *,
        success: bool | None,
        stored: Float[np.ndarray, " t"] | None = None,
        terminals: Bool[np.ndarray, " t"] | None = None,
        where: str,
    ) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the rewards and the terminals of an episode of ``length`` steps.

        Args:
            success: the result of ``success``.
            stored: the rewards that the format holds for the episode, if any.
            terminals: the format's own statement of where the task ended, if any.
            where: the episode (and file), for messages.

        Raises:
            ValueError: rewards are requested, but the success of the episode or the meaning of its rewards is unknown.
        """
        config, threshold = self.config, self.threshold
        last = np.arange(length) == length - 1
        kept, own = (stored, terminals) if config is None or config.source == "stored" else (None, None)
        own = own if self._believes_terminals else None
        reached = None if kept is None or threshold is None else kept >= threshold
        if reached is not None and own is None and self._believes_terminals and success is False and reached.any():
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
            raise _unknown_success(where)
        else:
            done = own if own is not None and own.any() else last & bool(success)
        if config is None:
            return (np.zeros(length, np.float32) if kept is None else kept), done
        ends = last if config.terminal_on_failure and not done.any() else done
        if kept is not None and unchanged:
            return kept, ends
        succeeded = done & bool(success) if reached is None else reached
        return succeeded.astype(np.float32) - (1 if config.convention == "-1/0" else 0), ends


def _threshold(config: RewardConfig | None, stored: Sequence[np.ndarray]) -> float | None:
    """Return the user's threshold; else 1 for rewards of 0 and 1, 0 for rewards of -1 and 0, None for others."""
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


def _unknown_success(where: str) -> ValueError:
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
        f"{where}: rewards: convention 'as_stored' needs rewards in the data, found none. To derive them from success, "
        "use --data.rewards.convention -1/0 or 0/1."
    )
