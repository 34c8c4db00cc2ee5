"""Held-out episodes: the part of a data set that training never sees, the same for everybody who asks.

The split is by whole episode, because neighbouring steps of one episode are nearly equal. It depends on a seed, on the
names of the episodes inside their data set and on their outcomes alone: not on where the files are, nor on the order of
reading them.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from acrlpd.data.sources import Dataset
from acrlpd.data.store import finals, windows
from acrlpd.data.store.episodes import EpisodeInfo
from acrlpd.types import Episode


def split(
    names: Sequence[str], fraction: float, seed: int, outcomes: Sequence[Hashable] | None = None
) -> Bool[np.ndarray, " n"]:
    """Return which of the episodes with these names are held out: ``fraction`` of them, at least one.

    Episodes of one outcome are ranked by a hash of the seed and their name. Those whose rank is lowest in proportion to
    the number of their kind are held out, so successes and failures are both there if the fraction allows two, except
    that the only episode of a kind comes last.
    """
    outcomes = [None] * len(names) if outcomes is None else outcomes
    digests = [hashlib.sha256(json.dumps([seed, name]).encode()).digest() for name in names]
    order = sorted(range(len(names)), key=lambda number: (digests[number], number))
    count, rank = collections.Counter(outcomes), collections.Counter[Hashable]()
    places = np.zeros(len(names))
    for number in order:
        kind = outcomes[number]
        places[number] = rank[kind] / count[kind] if count[kind] > 1 else 1.0
        rank[kind] += 1
    chosen = np.zeros(len(names), bool)
    if fraction > 0:
        first = sorted(order, key=lambda number: places[number])  # a stable sort: ties keep the order of their hashes
        chosen[first[: max(1, round(fraction * len(names)))]] = True
    return chosen


def outcome(dataset: Dataset, index: int) -> bool | None:
    """Return whether an episode succeeded: what the format says, else whether the task ended in it; None: unknown."""
    info = dataset.info(index)
    if info.success is not None:
        return info.success
    return True if dataset.window(index, "terminals", 0, info.length).any() else None


def names_within(dataset: Dataset, path: Any) -> list[str]:
    """Return the name of each episode: its file and group, below the path of the data set."""
    known = str(path)
    sources = [dataset.info(index).source for index in range(dataset.num_episodes)]
    return [PurePath(source.removeprefix(known)).as_posix().lstrip("/") for source in sources]


def divide(dataset: Dataset, path: Any, fraction: float, seed: int) -> Part:
    """Return the episodes to train on; ``Part.rest`` has the held-out ones.

    Raises:
        ValueError: no episode would be left to train on.
    """
    outcomes = [outcome(dataset, index) for index in range(dataset.num_episodes)]
    held_out = split(names_within(dataset, path), fraction, seed, outcomes)
    if fraction > 0 and held_out.all():
        raise ValueError(
            f"{path}: validation_fraction={fraction:g} would hold out {held_out.sum()} of {len(held_out)} episodes, "
            "and leave none to train on. Lower it, name more episodes, or set it to 0 to train on all of them"
        )
    return Part(dataset, ~held_out)


class Part:
    """Some episodes of a data set, the ``whole``, in its order; itself a ``Dataset``."""

    def __init__(self, whole: Dataset, chosen: Bool[np.ndarray, " n"]):
        self.whole = whole
        self._chosen = chosen
        self._indices = np.flatnonzero(chosen)

    @property
    def rest(self) -> Part:
        """The other episodes of the same data set."""
        return Part(self.whole, ~self._chosen)

    @property
    def num_episodes(self) -> int:
        return len(self._indices)

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        return np.asarray(self.whole.lengths)[self._indices]

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.whole.cameras

    @property
    def format(self) -> str:
        return self.whole.format

    @property
    def fps(self) -> float | None:
        return self.whole.fps

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self.whole.skipped

    @property
    def untold_tasks(self) -> Sequence[str]:
        return self.whole.untold_tasks

    @property
    def left_out(self) -> list[str]:
        return self.whole.left_out

    @property
    def robot_type(self) -> str | None:
        """The label of the robot, which only LeRobot has."""
        return getattr(self.whole, "robot_type", None)

    def info(self, index: int) -> EpisodeInfo:
        return self.whole.info(self._of_whole(index))

    def episode(self, index: int) -> Episode:
        return self.whole.episode(self._of_whole(index))

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        return self.whole.window(self._of_whole(index), key, start, stop)

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        return finals.has_final(self.whole, self.whole.num_episodes)[self._indices]

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        assert isinstance(self.whole, finals.FinalSource), "has_final is false for all episodes of other sources"
        return self.whole.final(self._of_whole(index), key)

    def check_videos(self) -> None:
        """Check the videos of the whole data set, if it has any."""
        windows.check_videos(self.whole)

    def _of_whole(self, index: int) -> int:
        if not 0 <= index < len(self._indices):
            raise IndexError(f"episode index {index} is not in 0..{len(self._indices) - 1}")
        return int(self._indices[index])
