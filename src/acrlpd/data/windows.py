"""Training data that need not fit into memory: what can be mapped is, other rows are read when a batch asks for them.

Pictures that were read stay in memory up to a limit, by episode, the least recently used going first. Reading, which
for videos means decoding, may be spread over processes. Neither changes what a batch holds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from acrlpd.data import processes
from acrlpd.data.episodes import IMAGE_PREFIX, EpisodeSource, EpisodeStore
from acrlpd.data.rows import Rows

COPIED_BYTES = 64 << 20  # so few are safe from whoever writes to the files meanwhile, and cost nothing
NUMBERS = ("state", "actions", "rewards", "terminals")
JOBS_PER_WORKER = 4  # of one read: few enough to send, enough for workers to finish together


def open_store(source: EpisodeSource, *, memory_bytes: int | None = None, num_workers: int = 0) -> EpisodeStore:
    """The episodes of ``source`` for training, with as much of them in memory as ``memory_bytes`` allows.

    Few bytes are copied into memory. Of more, what the source can map is left in its files (see ``mapped``). The rest
    is loaded where all of it fits, else its numbers are (rewards first, states last), and what remains is read when it
    is asked for. Half of the machine's memory is the limit if none is given. ``num_workers`` processes read; 0 reads in
    the caller's.
    """
    check_videos(source)
    store = _stored(source, _physical_memory() // 2 if memory_bytes is None else memory_bytes, num_workers)
    store.skipped = getattr(source, "skipped", ())
    return store


def open_stores(
    sources: Sequence[EpisodeSource], *, memory_bytes: int | None = None, num_workers: int = 0
) -> list[EpisodeStore]:
    """The same of several sources, which share ``memory_bytes`` by their sizes. Each that reads has its own workers."""
    limit = _physical_memory() // 2 if memory_bytes is None else memory_bytes
    sizes = [_row_bytes(source) * int(np.sum(source.lengths)) for source in sources] if len(sources) > 1 else [1]
    return [
        open_store(source, memory_bytes=limit * size // max(sum(sizes), 1), num_workers=num_workers)
        for source, size in zip(sources, sizes, strict=True)
    ]


def _row_bytes(source: EpisodeSource) -> int:
    return sum(source.window(0, key, 0, 1).nbytes for key in keys(source))


def _stored(source: EpisodeSource, limit: int, num_workers: int) -> EpisodeStore:
    features = {key: source.window(0, key, 0, 1) for key in keys(source)}
    num_rows = int(np.sum(source.lengths))
    needed = {key: num_rows * row.nbytes for key, row in features.items()}
    if sum(needed.values()) <= min(limit, COPIED_BYTES):
        return EpisodeStore.from_source(source)
    mapped = source.mapped() if isinstance(source, MappableSource) else {}
    needed = {key: nbytes for key, nbytes in needed.items() if key not in mapped}
    if not mapped and sum(needed.values()) <= limit:
        return EpisodeStore.from_source(source)
    kept, limit = _kept(needed, limit)
    reader = WindowReader(source, cache_bytes=limit, num_workers=num_workers) if kept < needed.keys() else None

    def rows(key: str) -> Rows | np.ndarray:
        if key in mapped:
            return mapped[key]
        if key in kept or reader is None:
            return _loaded(source, key, features[key])
        return SourceRows(reader, key, (num_rows, *features[key].shape[1:]))

    infos = [source.info(index) for index in range(source.num_episodes)]
    return EpisodeStore.of_columns({key: rows(key) for key in features}, infos, reader, source=source)


def _kept(needed: Mapping[str, int], limit: int) -> tuple[set[str], int]:
    """The keys to load, all or numbers alone, and the bytes that are left."""
    if sum(needed.values()) <= limit:
        return set(needed), limit - sum(needed.values())
    kept: set[str] = set()
    for key in sorted(needed.keys() & set(NUMBERS), key=lambda key: needed[key]):
        if needed[key] <= limit:
            kept.add(key)
            limit -= needed[key]
    return kept, limit


def keys(source: EpisodeSource) -> list[str]:
    return [*NUMBERS, *(IMAGE_PREFIX + camera for camera in source.cameras)]


@runtime_checkable
class MappableSource(Protocol):
    def mapped(self) -> Mapping[str, Rows | np.ndarray]:
        """All rows of those keys that need not be read."""
        ...


@runtime_checkable
class FilmedSource(Protocol):
    def check_videos(self) -> None:
        """Raises where a video has other frames than its episodes, or another size than the others."""
        ...


def check_videos(source: Any) -> None:
    """For those who are about to read pictures of all episodes; nothing where a source has no videos."""
    if isinstance(source, FilmedSource):
        source.check_videos()


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """One key of all episodes, indexed as an array is: by row numbers, or a slice."""

    reader: WindowReader
    key: str
    shape: tuple[int, ...]
    nbytes: int = 0  # the reader's cache is counted by the reader

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Int[np.ndarray, "*shape"] | slice) -> np.ndarray:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return self.reader.read(self.key, wanted.ravel()).reshape(*wanted.shape, *self.shape[1:])

    def take(self, rows: Int[np.ndarray, "*shape"], episodes: Int[np.ndarray, "*#shape"]) -> np.ndarray:
        return self[rows]

    def stretches(
        self, steps: Int[np.ndarray, "b h"], episodes: Int[np.ndarray, " b"]
    ) -> Shaped[np.ndarray, "b h *shape"]:
        return self[steps]


class WindowReader:
    """Rows of a source by number, over all its episodes. Safe to use from threads, which take turns.

    Args:
        cache_bytes: how much of the pictures read may stay in memory. Numbers are left to the system's file cache.
        num_workers: processes that read. Each opens its own files, and imports what the source needs (about 200 MB).
    """

    def __init__(self, source: EpisodeSource, *, cache_bytes: int, num_workers: int = 0):
        if num_workers < 0 or cache_bytes < 0:
            raise ValueError(f"num_workers ({num_workers}) and cache_bytes ({cache_bytes}) must be at least 0")
        self._source = source
        self._lengths = np.asarray(source.lengths)
        self._ends = np.cumsum(self._lengths)
        self._held = _Held(cache_bytes)
        self._num_workers = num_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._asked = self._hits = 0

    @property
    def hit_rate(self) -> float:
        return self._hits / max(self._asked, 1)

    def read(self, key: str, rows: Int[np.ndarray, " r"]) -> Shaped[np.ndarray, "r *shape"]:
        """Rows in the order asked for; the same one may be asked for several times."""
        if not len(rows):
            return self._source.window(0, key, 0, 0)
        with self._lock:
            groups = list(self._by_episode(rows))
            held = [self._held.get(key, group.episode) for group in groups]
            missing = [_missing(group, kept) for group, kept in zip(groups, held, strict=True)]
            jobs = [(group.episode, key, steps) for group, steps in zip(groups, missing, strict=True) if len(steps)]
            fetched = self._fetched(jobs)
            out: np.ndarray | None = None
            for group, kept, steps in zip(groups, held, missing, strict=True):
                new = dict(zip(steps.tolist(), next(fetched), strict=True)) if len(steps) else {}
                if key.startswith(IMAGE_PREFIX):
                    self._count(group, new)
                    self._held.add(key, group.episode, new)
                for place, step in zip(group.places.tolist(), group.steps.tolist(), strict=True):
                    row = new[step] if step in new else kept[step]
                    out = np.empty((len(rows), *row.shape), row.dtype) if out is None else out
                    out[place] = row
        assert out is not None
        return out

    def _count(self, group: _Group, new: Mapping[int, np.ndarray]) -> None:
        self._asked += len(group.steps)
        self._hits += sum(step not in new for step in group.steps.tolist())

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _by_episode(self, rows: np.ndarray) -> Iterator[_Group]:
        order = np.argsort(rows, kind="stable")
        episodes = np.searchsorted(self._ends, rows[order], side="right")
        steps = rows[order] - (self._ends - self._lengths)[episodes]
        cuts = np.flatnonzero(np.diff(episodes)) + 1
        for places, own, numbers in zip(*(np.split(each, cuts) for each in (order, episodes, steps)), strict=True):
            yield _Group(int(own[0]), places, numbers)

    def _fetched(self, jobs: Sequence[_Job]) -> Iterator[np.ndarray]:
        if not self._num_workers or not jobs:
            yield from (_fetch(self._source, *job) for job in jobs)
            return
        if self._pool is None:
            self._pool = processes.start(self._num_workers, _adopt, self._source)
        size = math.ceil(len(jobs) / (JOBS_PER_WORKER * self._num_workers))
        with processes.explained(self._num_workers):
            yield from self._pool.map(_fetch_adopted, jobs, chunksize=size)


_Job = tuple[int, str, np.ndarray]  # episode, key, steps in rising order


@dataclasses.dataclass(frozen=True)
class _Group:
    """What is asked of one episode."""

    episode: int
    places: Int[np.ndarray, " n"]  # in the result
    steps: Int[np.ndarray, " n"]  # rising, some perhaps several times


class _Held:
    """Rows by key, episode and step; where room is wanted, the episode used longest ago goes."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._rows: OrderedDict[tuple[str, int], dict[int, np.ndarray]] = OrderedDict()

    def get(self, key: str, episode: int) -> Mapping[int, np.ndarray]:
        return self._rows.get((key, episode), {})

    def add(self, key: str, episode: int, rows: Mapping[int, np.ndarray]) -> None:
        """Also marks the episode as used."""
        kept = self._rows.setdefault((key, episode), {})
        self._rows.move_to_end((key, episode))
        for step, row in rows.items():
            kept[step] = row.copy()  # a view would keep all that was read with it
            self._nbytes += row.nbytes
        while self._nbytes > self._max_bytes:
            self._nbytes -= sum(row.nbytes for row in self._rows.popitem(last=False)[1].values())


def _missing(group: _Group, kept: Mapping[int, np.ndarray]) -> Int[np.ndarray, " n"]:
    steps = np.unique(group.steps)
    return steps[[step not in kept for step in steps.tolist()]] if kept else steps


def _fetch(source: EpisodeSource, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
    """The steps, read by runs of neighbours."""
    runs = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)
    return _joined(source.window(episode, key, int(run[0]), int(run[-1]) + 1) for run in runs)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    blocks = list(parts)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


_adopted: Any = None  # the source of a worker process


def _adopt(source: EpisodeSource) -> None:
    global _adopted
    _adopted = source


def _fetch_adopted(job: _Job) -> np.ndarray:
    return _fetch(_adopted, *job)


def _loaded(source: EpisodeSource, key: str, like: np.ndarray) -> np.ndarray:
    """All rows of one key, in memory."""
    rows = np.empty((int(np.sum(source.lengths)), *like.shape[1:]), like.dtype)
    end = 0
    for index, length in enumerate(source.lengths.tolist()):
        rows[end : end + length] = source.window(index, key, 0, length)
        end += length
    return rows


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
