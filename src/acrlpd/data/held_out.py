"""Episodes that training does not see: which ones they are, and a data set without the others."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Int, Shaped

from acrlpd.data.sources import Dataset
from acrlpd.data.store import finals, windows
from acrlpd.data.store.episodes import EpisodeInfo
from acrlpd.types import Episode


def held_out(kinds: Sequence[Hashable], fraction: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Return which episodes are held out: of each kind (success, failure) those with the smallest hashes.

    ``kinds`` has one entry per episode. The hash is of the seed and the episode's index. Of a kind with n episodes,
    ``round(fraction * n)`` are held out, at least one, but never all.
    """
    chosen = np.zeros(len(kinds), bool)
    by_kind: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, kind in enumerate(kinds):
        by_kind[kind].append(index)
    for members in by_kind.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[sorted(members, key=lambda index: _hash(seed, index))[:count]] = True
    return chosen


def _hash(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed} {index}".encode()).digest()


def outcome(source: Dataset, index: int) -> bool | None:
    """Return whether an episode succeeded: what the format says, else whether the task ended in it; None: unknown."""
    info = source.info(index)
    if info.success is not None:
        return info.success
    ended = bool(source.window(index, "terminals", 0, info.length).any())
    return True if ended else None


class SomeEpisodes:
    """A ``Dataset`` of some of the episodes of another one, in its order."""

    def __init__(self, source: Dataset, indices: Int[np.ndarray, " n"]):
        self._source = source
        self._indices = indices
        self.cameras = source.cameras
        self.format, self.fps = source.format, source.fps
        self.skipped, self.left_out, self.untold_tasks = source.skipped, source.left_out, source.untold_tasks
        self.robot_type = getattr(source, "robot_type", None)

    @property
    def num_episodes(self) -> int:
        return len(self._indices)

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        return np.asarray(self._source.lengths)[self._indices]

    def info(self, index: int) -> EpisodeInfo:
        return self._source.info(int(self._indices[index]))

    def episode(self, index: int) -> Episode:
        return self._source.episode(int(self._indices[index]))

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        return self._source.window(int(self._indices[index]), key, start, stop)

    def check_videos(self) -> None:
        windows.check_videos(self._source)

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        return finals.has_final(self._source, self._source.num_episodes)[self._indices]

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        """Read the ``state`` or ``images/<camera>`` of an episode that recorded its final observation."""
        assert isinstance(self._source, finals.FinalSource), "has_final is False otherwise"
        return self._source.final(int(self._indices[index]), key)


def split(source: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return the episodes to train on, and those held out."""
    out = held_out([outcome(source, index) for index in range(source.num_episodes)], fraction, seed)
    return SomeEpisodes(source, np.flatnonzero(~out)), SomeEpisodes(source, np.flatnonzero(out))
