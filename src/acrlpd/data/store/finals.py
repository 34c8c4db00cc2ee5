"""Final observations: the observation after the last action of each episode, if it was recorded.

It has no row: no action follows it. A whole window that ends with its episode bootstraps from it (``chunks.gather``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Shaped

from acrlpd.data.store.rows import Column, FixedColumn
from acrlpd.types import Episode, FinalObservation

IMAGE_PREFIX = "images/"  # a camera's key: "images/<camera>"


@runtime_checkable
class FinalSource(Protocol):
    """Episodes of which some recorded the observation after their last action."""

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        """True for each episode that recorded it."""
        ...

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        """Read the ``state`` or ``images/<camera>`` of an episode that recorded it."""
        ...


def has_final(source: object, num_episodes: int) -> Bool[np.ndarray, " n"]:
    """Return which episodes of ``source`` recorded their final observation; none if it is no ``FinalSource``."""
    return source.has_final if isinstance(source, FinalSource) else np.zeros(num_episodes, bool)


def is_seen(key: str) -> bool:
    """Return whether a key belongs to an observation, and so to a final one."""
    return key == "state" or key.startswith(IMAGE_PREFIX)


def seen_rows(episode: Episode) -> dict[str, np.ndarray]:
    """Return the rows of an episode that belong to its observations, by key."""
    return {"state": episode.state} | {IMAGE_PREFIX + camera: frames for camera, frames in episode.images.items()}


def nbytes_of(rows: Mapping[str, np.ndarray], final: Mapping[str, np.ndarray] | None) -> int:
    return sum(value.nbytes for value in (*rows.values(), *(final or {}).values()))


def rows_of(episode: Episode, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Return the final observation by key, or None; refuse one whose form differs from the episode's rows."""
    if episode.final is None:
        return None
    given = {"state": episode.final.state} | {IMAGE_PREFIX + name: x for name, x in episode.final.images.items()}
    final = {}
    for key in filter(is_seen, rows):
        like = rows[key]
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused
            row = np.asarray(given[key], like.dtype if key == "state" else None) if key in given else None
        if row is None or row.shape != like.shape[1:] or row.dtype != like.dtype or not np.isfinite(row).all():
            found = "nothing" if row is None else f"{row.dtype} {row.shape}"
            raise ValueError(
                f"{episode.source}: final {key}: expected finite {like.dtype} {like.shape[1:]} as in the steps before, "
                f"found {found}. Record it in the same form, or leave the final observation out."
            )
        final[key] = row
    return final


def final_observation(source: object, index: int, cameras: tuple[str, ...]) -> FinalObservation | None:
    """Read one final observation, with the pictures of ``cameras``; None if there is none."""
    if not isinstance(source, FinalSource) or not source.has_final[index]:
        return None
    images = {camera: source.final(index, IMAGE_PREFIX + camera) for camera in cameras}
    return FinalObservation(source.final(index, "state"), images)


class Finals:
    """The final observations of a store, by the positions of their episodes."""

    def __init__(self) -> None:
        self._numbers = Column((), np.int64)  # per episode: the position among all finals ever kept, or -1
        self._columns: dict[str, Column | FixedColumn] = {}
        self._count = self._dropped = 0

    @classmethod
    def of_source(cls, source: object, num_episodes: int, keys: list[str]) -> Finals:
        """Return finals that are read from ``source`` on demand, because few chunks end with their episode."""
        finals, known = cls(), has_final(source, num_episodes)
        finals._numbers.append(np.where(known, np.cumsum(known) - 1, -1))
        finals._count = int(known.sum())
        if isinstance(source, FinalSource):
            episodes = np.flatnonzero(known)
            finals._columns = {key: FixedColumn(_SourceFinals(source, key, episodes)) for key in keys}
        return finals

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """True for each episode that has one."""
        return self._numbers.rows >= 0

    def has(self, episodes: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        """Return which of these episodes have one."""
        return self._numbers.rows[episodes] >= 0

    @property
    def nbytes(self) -> int:
        return sum(column.rows.nbytes for column in self._columns.values())

    def append(self, rows: Mapping[str, np.ndarray] | None) -> None:
        """Add the final observation of the next episode, by key; None if it has none."""
        self._numbers.append(np.array([-1 if rows is None else self._count]))
        if rows is None:
            return
        if not self._columns:
            self._columns = {key: Column(row.shape, row.dtype) for key, row in rows.items()}
        for key, row in rows.items():
            self._columns[key].append(row[None])
        self._count += 1

    def drop(self) -> None:
        """Drop the final observation of the oldest episode."""
        if self.known[0]:
            self._dropped += 1
            for column in self._columns.values():
                column.drop(1)
        self._numbers.drop(1)

    def take(self, key: str, episodes: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, "b *shape"]:
        """Return one key of the final observations of these episodes; all of them must have one."""
        return self._columns[key].take(self._numbers.rows[episodes] - self._dropped)


@dataclasses.dataclass(frozen=True)
class _SourceFinals:
    """One key of all final observations of a source."""

    source: FinalSource
    key: str
    episodes: Int[np.ndarray, " m"]  # those that have one
    nbytes: int = 0

    def __getitem__(self, rows: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, "b *shape"]:
        return np.stack([self.source.final(int(index), self.key) for index in self.episodes[rows]])
