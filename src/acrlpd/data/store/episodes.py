"""Recorded episodes: the interface of every source of episodes, and a store that holds them in memory.

The store keeps all rows of all episodes in flat arrays, in raw units, so that a batch needs few fancy-index reads.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from acrlpd.data.store import finals
from acrlpd.data.store.finals import IMAGE_PREFIX, Finals
from acrlpd.data.store.flat import is_mapped
from acrlpd.data.store.rows import Column, FixedColumn, as_finite
from acrlpd.types import Episode


class OptionError(ValueError):
    """A reader option that does not fit the data; nothing is wrong with the episodes."""


def check_fps(fps: float | None) -> float | None:
    """Return the rate; refuse one that is not positive. None means that the rate is unknown."""
    if fps is not None and not 0 < fps < math.inf:
        raise OptionError(f"fps must be positive, got {fps}")
    return fps


@dataclasses.dataclass(frozen=True)
class EpisodeInfo:
    """The facts about an episode that are known without reading its rows."""

    length: int  # steps
    task: str
    success: bool | None  # None if unknown
    source: str  # file (and group) of the episode, for messages
    task_changes: tuple[tuple[int, str], ...] = ()  # see ``Episode``


def task_runs(episode: Episode | EpisodeInfo) -> list[tuple[int, str]]:
    """Return the instructions of an episode as pairs (first step, text)."""
    return [(0, episode.task), *episode.task_changes]


def step_tasks(episode: Episode, numbers: dict[str, int]) -> Int[np.ndarray, " t"]:
    """Return the number of the instruction at each step; new instructions are added to ``numbers``."""
    starts, texts = zip(*task_runs(episode), strict=True)
    found = [numbers.setdefault(text, len(numbers)) for text in texts]
    return np.repeat(found, np.diff([*starts, len(episode)]))


def first_text(*texts: str) -> str:
    """Return the first text that is not blank, or an empty one."""
    return next((text for text in texts if text.strip()), "")


def check_task_changes(where: str, changes: Sequence[tuple[int, str]], length: int) -> None:
    """Raise unless ``changes`` are pairs (step, text) with ascending steps inside the episode."""
    steps = [step for step, _ in changes]
    rise = all(before < after for before, after in itertools.pairwise([0, *steps, length]))
    if changes and not (rise and all(isinstance(text, str) for _, text in changes)):
        raise ValueError(
            f"{where}: task_changes: expected texts behind rising steps in 1..{length - 1}, found {list(changes)}"
        )


NUMBERS = ("state", "actions", "rewards", "terminals")
KNOWN_SUCCESS = (None, False, True)  # readers store the index: 0, 1, 2 = unknown, failed, succeeded


@runtime_checkable
class EpisodeSource(Protocol):
    """Recorded episodes from any storage, by index 0..num_episodes-1, in a fixed order.

    Keys are ``state``, ``actions``, ``rewards``, ``terminals`` and ``images/<camera>``.
    """

    @property
    def num_episodes(self) -> int: ...

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """The number of steps of each episode."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]: ...

    def info(self, index: int) -> EpisodeInfo: ...

    def episode(self, index: int) -> Episode: ...

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        """Read rows ``start`` to ``stop`` (exclusive) of one key of an episode; both must lie inside the episode."""
        ...


@runtime_checkable
class FlatSource(Protocol):
    """An ``EpisodeSource`` that has all its numbers at hand."""

    @property
    def flat(self) -> Mapping[str, np.ndarray]:
        """All rows of ``state``, ``actions``, ``rewards`` and ``terminals``."""
        ...


class PictureReader(Protocol):
    """A reader of pictures that are not in memory."""

    @property
    def hit_rate(self) -> float:
        """Share of the requested pictures that were in memory already."""
        ...

    def close(self) -> None:
        """Stop the reader's processes."""
        ...


def whole_episode(source: EpisodeSource, index: int, cameras: Iterable[str] | None = None) -> Episode:
    """Read all rows of an episode, and what was seen after them; the pictures of ``cameras`` only, by default of all.

    Nothing in it changes with the source later: views of the source's own arrays are copied.
    """
    info, cameras = source.info(index), tuple(source.cameras if cameras is None else cameras)

    def whole(key: str) -> np.ndarray:
        rows = source.window(index, key, 0, info.length)
        return rows if rows.flags.owndata else rows.copy()

    return Episode(
        state=whole("state"),
        actions=whole("actions"),
        rewards=whole("rewards"),
        terminals=whole("terminals"),
        task=info.task,
        task_changes=info.task_changes,
        images={camera: whole(IMAGE_PREFIX + camera) for camera in cameras},
        success=info.success,
        source=info.source,
        final=finals.final_observation(source, index, cameras),
    )


def check_is_read(where: str, key: str, left_out: Iterable[str]) -> None:
    """Raise if a reader has left out ``key``; entries of ``left_out`` are a key and, in brackets, the reason."""
    for told in left_out:
        if told.startswith(f"{key} ("):
            raise ValueError(f"{where}: this key is left out: {told}")


def told_numbers(shape: Sequence[int]) -> str:
    """Return in words how many numbers a key has per step."""
    size = "x".join(map(str, shape)) or "1"
    return f"{size} number{'' if size == '1' else 's'}"


class BadEpisodes:
    """The handling of episodes that cannot be used: stop at the first one, or leave all of them out with a warning.

    ``skipped`` holds the name of each episode that was left out, and the text of its error as the reason.
    """

    def __init__(self, on_bad_episode: Literal["error", "skip"]):
        if on_bad_episode not in ("error", "skip"):
            raise ValueError(f"on_bad_episode must be 'error' or 'skip', got {on_bad_episode!r}")
        self.skip = on_bad_episode == "skip"
        self.skipped: list[tuple[str, str]] = []
        self._fault: type[ValueError] = OptionError  # as long as only options were wrong

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Guard code that concerns only the episode ``name``. A fault of the whole set must be raised outside."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            self.skipped.append((name, str(error)))
            if not isinstance(error, OptionError):
                self._fault = ValueError
            warnings.warn(f"episode left out: {error}", stacklevel=4)

    def report(self, where: str, total: int) -> None:
        """Warn how many of ``total`` episodes were left out; raise if none is left."""
        if total and len(self.skipped) == total:
            raise self._fault(f"{where}: no episode is left, all {total} were skipped; the first: {self.skipped[0][1]}")
        if self.skipped:
            warnings.warn(f"{where}: {len(self.skipped)} of {total} episodes were left out", stacklevel=3)


def usual_features(features: Iterable[Mapping[str, Hashable]]) -> dict[str, Any]:
    """Return the most common feature of each name, in the order in which names first occur; None if most have none."""
    found = list(features)
    names = dict.fromkeys(name for each in found for name in each)
    return {name: collections.Counter(each.get(name) for each in found).most_common(1)[0][0] for name in names}


def check_alike(
    features: Mapping[int, Mapping[str, Hashable]],
    index: int,
    usual: Mapping[str, Any],
    source_of: Callable[[int], str],
    told: Callable[[Any], str],
) -> None:
    """Raise unless episode ``index`` has the ``usual`` features; ``told`` describes a feature in words."""
    found = features[index]
    for name, expected in usual.items():
        if found.get(name) != expected:
            model = next(other for other in features if features[other].get(name) == expected)
            raise ValueError(
                f"{source_of(index)}: {name}: expected {told(expected)} as in {source_of(model)} "
                f"(most episodes agree), found {told(found.get(name))}"
            )


class HeldEpisodes:
    """The base class of ``EpisodeSource`` readers that load all episodes into ``_store`` when they open."""

    _store: EpisodeStore
    untold_tasks: Sequence[str] = ()

    @property
    def store(self) -> EpisodeStore:
        """The episodes themselves. Training reads them there, without a second copy; nobody may append to it."""
        return self._store

    @property
    def num_episodes(self) -> int:
        return self._store.num_episodes

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        return self._store.lengths

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._store.images)

    def info(self, index: int) -> EpisodeInfo:
        return self._store.info(index)

    def episode(self, index: int) -> Episode:
        return self._store.episode(index)

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        return self._store.window(index, key, start, stop)

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        return self._store.has_final

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        return self._store.final(index, key)

    @property
    def flat(self) -> dict[str, np.ndarray]:
        return {key: getattr(self._store, key) for key in NUMBERS}


class EpisodeStore:
    """Episodes in memory, appended at the end; itself an ``EpisodeSource``.

    Rows are numbered 0..num_rows-1 over all episodes kept. With ``max_bytes``, the oldest episodes are dropped to make
    room for a new one: row numbers shift, episode ids keep counting. The limit applies to the rows kept; their buffers
    may take half as much again. Only one thread may use it at a time: an append may move the rows under a reader.
    """

    def __init__(self, *, max_bytes: int | None = None):
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}. Leave it out to keep every episode.")
        self.max_bytes = max_bytes
        self.reader: PictureReader | None = None  # None if no pictures are read on demand
        self.in_memory = True  # whether the numbers are, rather than in a mapped file
        self.skipped: Sequence[tuple[str, str]] = ()  # name and fault of each episode that the source left out
        self._columns: dict[str, Column | FixedColumn] = {}
        self._first_source = ""  # the episode whose shapes all others must have
        self._ends = Column((), np.int64)  # counted from the first row ever appended, so that dropping shifts nothing
        # first row of each instruction, counted like the ends, and its number; most episodes have one instruction
        self._task_starts = Column((), np.int64)
        self._task_indices = Column((), np.int64)
        self._infos: list[EpisodeInfo] = []
        self._tasks: dict[str, int] = {}
        self._task_texts = np.zeros(0, dtype=np.str_)
        self._rows_dropped = 0
        self._episodes_dropped = 0
        self._known_numbering: _Numbering | None = None  # None after an episode was added or dropped
        self._finals = Finals()

    @classmethod
    def from_episodes(cls, episodes: Iterable[Episode], *, max_bytes: int | None = None) -> EpisodeStore:
        store = cls(max_bytes=max_bytes)
        for episode in episodes:
            store.append(episode)
        return store

    @classmethod
    def from_source(cls, source: EpisodeSource, *, max_bytes: int | None = None) -> EpisodeStore:
        """Load all episodes of ``source``. Lengths are known beforehand, so no buffer is copied to grow."""
        store = cls(max_bytes=max_bytes)
        for index in range(source.num_episodes):
            store.append(source.episode(index))
            if index == 0 and max_bytes is None:
                store._reserve(int(np.sum(source.lengths[1:])))
        return store

    @classmethod
    def of_columns(
        cls,
        columns: Mapping[str, Any],
        infos: Sequence[EpisodeInfo],
        reader: PictureReader | None = None,
        *,
        source: object = None,
    ) -> EpisodeStore:
        """Return a store of rows that lie elsewhere; it cannot grow. Keys are those of an ``EpisodeSource``.

        Columns are arrays, or objects that are indexed like them. ``source`` provides the final observations, if it is
        a ``FinalSource``.
        """
        store = cls()
        store.reader = reader
        store.in_memory = not any(map(is_mapped, columns.values()))
        # a plain view of a mapped array, because indexing a numpy.memmap takes longer
        plain = {key: rows.view(np.ndarray) if is_mapped(rows) else rows for key, rows in columns.items()}
        store._columns = {key: FixedColumn(rows) for key, rows in plain.items()}
        store._ends.append(np.cumsum([info.length for info in infos]))
        store._infos = list(infos)
        starts = store.starts.tolist()
        store._append_tasks(
            (start + step, text) for start, info in zip(starts, infos, strict=True) for step, text in task_runs(info)
        )
        store._finals = Finals.of_source(source, len(infos), [key for key in columns if finals.is_seen(key)])
        return store

    @property
    def num_rows(self) -> int:
        return len(self._columns["state"].rows) if self._columns else 0

    @property
    def num_episodes(self) -> int:
        return len(self._infos)

    @property
    def nbytes(self) -> int:
        """The size of the rows and final observations kept, in bytes."""
        return sum(column.rows.nbytes for column in self._columns.values()) + self._finals.nbytes

    @property
    def first_episode_id(self) -> int:
        """The id of the oldest episode kept; lower ids were dropped."""
        return self._episodes_dropped

    @property
    def next_episode_id(self) -> int:
        return self._episodes_dropped + self.num_episodes

    @property
    def state(self) -> Float[np.ndarray, "r s"]:
        return self._rows("state")

    @property
    def actions(self) -> Float[np.ndarray, "r a"]:
        return self._rows("actions")

    @property
    def rewards(self) -> Float[np.ndarray, " r"]:
        return self._rows("rewards")

    @property
    def terminals(self) -> Shaped[np.ndarray, " r"]:
        return self._rows("terminals")

    @property
    def images(self) -> dict[str, Shaped[np.ndarray, "r _ _ 3"]]:
        """The pictures by camera."""
        return {
            key.removeprefix(IMAGE_PREFIX): column.rows
            for key, column in self._columns.items()
            if key.startswith(IMAGE_PREFIX)
        }

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.images)

    @property
    def tasks(self) -> list[str]:
        """Every task text seen so far."""
        return list(self._tasks)

    @property
    def ends(self) -> Int[np.ndarray, " n"]:
        """The row after the last one of each episode."""
        return self._numbering.ends

    @property
    def starts(self) -> Int[np.ndarray, " n"]:
        """The first row of each episode."""
        return self._numbering.starts

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        return self.ends - self.starts

    def full_windows(self, horizon: int) -> Int[np.ndarray, " n"]:
        """Return the number of windows of ``horizon`` rows inside an episode, cumulated up to each episode's end."""
        known = self._numbering.full_windows
        if horizon not in known:
            known[horizon] = np.cumsum(np.maximum(self.lengths - horizon + 1, 0))
        return known[horizon]

    def episode_index(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Return the position of each row's episode among the episodes kept; position + first_episode_id is its id."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise IndexError(f"rows must lie in 0..{self.num_rows - 1}, got {rows.min()}..{rows.max()}")
        return np.searchsorted(self.ends, rows, side="right")

    def instructions(self, rows: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, " b"]:
        """Return the instruction that is valid at each row."""
        if len(self._task_texts) < len(self._tasks):
            self._task_texts = np.array(list(self._tasks), dtype=np.str_)
        places = np.searchsorted(self._task_starts.rows, self._rows_dropped + rows, side="right") - 1
        return self._task_texts[self._task_indices.rows[places]]

    def append(self, episode: Episode) -> int:
        """Add an episode and return its id. Ids count from 0 and are never reused.

        Raises:
            ValueError: rows are missing, not finite, or have another shape than in the first episode; or the episode
                alone exceeds ``max_bytes``. The error names the episode's source.
        """
        rows = self.checked(episode)
        if not self._columns:
            self._columns = {key: Column(value.shape[1:], value.dtype) for key, value in rows.items()}
            self._first_source = episode.source
        final = finals.rows_of(episode, rows)
        self._make_room(finals.nbytes_of(rows, final))
        self._finals.append(final)
        for key, value in rows.items():
            self._columns[key].append(value)
        end = self._rows_dropped + self.num_rows
        self._ends.append(np.array([end]))
        self._infos.append(_info(episode))
        self._append_tasks((end - len(episode) + step, text) for step, text in task_runs(episode))
        self._known_numbering = None
        return self.next_episode_id - 1

    def checked(self, episode: Episode) -> dict[str, np.ndarray]:
        """Return the episode's rows by key; raise the errors of ``append`` without changing the store."""
        rows = _checked_rows(episode)
        if self._columns:
            self._check_shapes(rows, episode.source)
        nbytes = finals.nbytes_of(rows, finals.rows_of(episode, rows))
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ValueError(
                f"{episode.source}: the episode needs {nbytes} bytes, more than max_bytes ({self.max_bytes}). "
                "Raise it (in a run: --data.max_replay_bytes), or record shorter episodes."
            )
        return rows

    def info(self, index: int) -> EpisodeInfo:
        return self._infos[self._checked_index(index)]

    def episode(self, index: int) -> Episode:
        """Return a copy of one episode; ``index`` counts the episodes kept, and 0 is the oldest."""
        return whole_episode(self, index)

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        """True for each episode whose final observation is known."""
        return self._finals.known

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        return self._finals.take(key, np.array([self._checked_index(index)]))[0]

    def knows_final(self, episodes: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        """Return ``has_final`` of these episodes, by position."""
        return self._finals.has(episodes)

    def take_finals(self, key: str, episodes: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, "b *shape"]:
        """Return ``state`` or ``images/<camera>`` of the final observations of these episodes; all must have one."""
        return self._finals.take(key, episodes)

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        """Return a view that is valid until the next append."""
        length = self.info(index).length
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.info(index).source}: window {start}..{stop} leaves the episode (0..{length})")
        first = int(self.ends[index]) - length
        return self._rows(key)[first + start : first + stop]

    @property
    def _numbering(self) -> _Numbering:
        if self._known_numbering is None:
            self._known_numbering = _Numbering(self._ends.rows - self._rows_dropped)
        return self._known_numbering

    def take(self, key: str, rows: Int[np.ndarray, "*shape"]) -> np.ndarray:
        """Return rows of a key by number."""
        return self._column(key).take(rows)

    def take_stretches(self, key: str, steps: Int[np.ndarray, "b h"]) -> Shaped[np.ndarray, "b h *shape"]:
        """Like ``take``, for steps that count up to their episode's last row and then repeat it; this is faster."""
        column = self._column(key)
        found = column.stretches(steps)
        past = np.flatnonzero(steps[:, -1] - steps[:, 0] < steps.shape[1] - 1)
        if len(past):
            found[past] = column.take(steps[past])
        return found

    def _rows(self, key: str) -> np.ndarray:
        return self._column(key).rows

    def _column(self, key: str) -> Column | FixedColumn:
        if key not in self._columns:
            reason = "the store is empty" if not self._columns else f"it has {', '.join(self._columns)}"
            raise KeyError(f"this EpisodeStore has no key {key!r}: {reason}")
        return self._columns[key]

    def _checked_index(self, index: int) -> int:
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode index {index} is not in 0..{self.num_episodes - 1}")
        return index

    def _reserve(self, num_rows: int) -> None:
        for column in self._columns.values():
            column.reserve(num_rows)

    def _check_shapes(self, rows: dict[str, np.ndarray], source: str) -> None:
        if rows.keys() != self._columns.keys():
            raise ValueError(
                f"{source}: keys {sorted(rows)} differ from {sorted(self._columns)} of the first episode "
                f"({self._first_source}). All episodes of a store need the same cameras."
            )
        for key, value in rows.items():
            expected = self._columns[key].rows.shape[1:]
            if value.shape[1:] != expected:
                raise ValueError(
                    f"{source}: each step of {key} has shape {value.shape[1:]}, expected {expected} as in the first "
                    f"episode ({self._first_source}). Convert the episode or keep it in a store of its own."
                )

    def _make_room(self, nbytes: int) -> None:
        while self.max_bytes is not None and self.nbytes + nbytes > self.max_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        info = self._infos.pop(0)
        length = info.length
        for column in self._columns.values():
            column.drop(length)
        self._ends.drop(1)
        self._finals.drop()
        for tasks in (self._task_starts, self._task_indices):
            tasks.drop(1 + len(info.task_changes))
        self._rows_dropped += length
        self._episodes_dropped += 1
        self._known_numbering = None

    def _append_tasks(self, runs: Iterable[tuple[int, str]]) -> None:
        """Add instructions; ``runs`` are pairs (first row, counted from the first one ever appended; text)."""
        found = np.array([(start, self._intern(text)) for start, text in runs], np.int64).reshape(-1, 2)
        self._task_starts.append(found[:, 0])
        self._task_indices.append(found[:, 1])

    def _intern(self, task: str) -> int:
        if task not in self._tasks:
            self._tasks[task] = len(self._tasks)
        return self._tasks[task]


class _Numbering:
    """The row numbers of episodes, kept for many batches: computing them for 10,000 episodes takes longer than one."""

    def __init__(self, ends: Int[np.ndarray, " n"]):
        self.ends = ends
        self.starts = np.concatenate([[0], ends[:-1]]).astype(ends.dtype)
        self.full_windows: dict[int, Int[np.ndarray, " n"]] = {}  # by horizon


def _info(episode: Episode) -> EpisodeInfo:
    return EpisodeInfo(len(episode), episode.task, episode.success, episode.source, episode.task_changes)


def _checked_rows(episode: Episode) -> dict[str, np.ndarray]:
    """Return the episode's arrays by key, in the dtypes of a store; refuse arrays that no store should hold."""
    source = episode.source
    rows = {key: as_finite(getattr(episode, key), f"{source}: {key}") for key in ("state", "actions", "rewards")}
    rows["terminals"] = np.asarray(episode.terminals, bool)
    for key, rank in (("state", 2), ("actions", 2), ("rewards", 1), ("terminals", 1)):
        if rows[key].ndim != rank:
            raise ValueError(f"{source}: {key} has shape {rows[key].shape}, expected {rank} axes, time first")
    for camera, images in episode.images.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"{source}: images/{camera} is {images.dtype} {images.shape}, expected uint8 (steps, height, width, 3)"
            )
        rows[IMAGE_PREFIX + camera] = images
    lengths = {key: len(value) for key, value in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: all keys of an episode need the same number of steps, got {lengths}")
    if len(episode) == 0:
        raise ValueError(f"{source}: the episode is empty (0 steps)")
    check_task_changes(source, episode.task_changes, len(episode))
    return rows
