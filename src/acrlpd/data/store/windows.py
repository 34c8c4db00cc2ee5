"""Training data that need not fit into memory: numbers are mapped, pictures are read when a batch needs them.

Pictures that were read are cached by episode up to a limit; the least recently used episode is dropped first. Reading,
which for videos means decoding, may be spread over processes. Neither changes the content of a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from acrlpd.data.store import flat, processes
from acrlpd.data.store.episodes import IMAGE_PREFIX, NUMBERS, EpisodeSource, EpisodeStore, FlatSource, HeldEpisodes
from acrlpd.data.store.rows import as_finite
from acrlpd.files import physical_memory

JOBS_PER_WORKER = 4  # groups of jobs in one read: few enough to send, enough that workers finish together


def open_store(source: EpisodeSource, *, memory_bytes: int | None = None, num_workers: int = 0) -> EpisodeStore:
    """Open the episodes of ``source`` for training, with their pictures in memory if ``memory_bytes`` allows.

    Numbers are in memory if they are small, else in a mapped file of ours (see ``flat``). Pictures are loaded if all of
    them fit, and are read on demand otherwise. The default limit is half of the machine's memory. ``num_workers``
    processes read; with 0 the calling process does. A source that holds its episodes in memory gives its own store.
    """
    if isinstance(source, HeldEpisodes):
        source.store.skipped = getattr(source, "skipped", ())
        return source.store
    check_videos(source)
    store = _stored(source, physical_memory() // 2 if memory_bytes is None else memory_bytes, num_workers)
    store.skipped = getattr(source, "skipped", ())
    return store


def open_stores(
    sources: Sequence[EpisodeSource], *, memory_bytes: int | None = None, num_workers: int = 0
) -> list[EpisodeStore]:
    """Open several sources, which share ``memory_bytes`` in proportion to their sizes; each has its own workers."""
    limit = physical_memory() // 2 if memory_bytes is None else memory_bytes
    sizes = [_row_bytes(source) * int(np.sum(source.lengths)) for source in sources] if len(sources) > 1 else [1]
    return [
        open_store(source, memory_bytes=limit * size // max(sum(sizes), 1), num_workers=num_workers)
        for source, size in zip(sources, sizes, strict=True)
    ]


def _row_bytes(source: EpisodeSource) -> int:
    return sum(source.window(0, key, 0, 1).nbytes for key in (*NUMBERS, *_camera_keys(source)))


def _stored(source: EpisodeSource, limit: int, num_workers: int) -> EpisodeStore:
    numbers = source.flat if isinstance(source, FlatSource) else _numbers(source)
    cameras = {key: source.window(0, key, 0, 1) for key in _camera_keys(source)}
    num_rows = int(np.sum(source.lengths))
    limit -= sum(rows.nbytes for rows in numbers.values() if not flat.is_mapped(rows))
    pictures_fit = not cameras or num_rows * sum(row.nbytes for row in cameras.values()) <= limit
    if pictures_fit and not any(map(flat.is_mapped, numbers.values())):
        return EpisodeStore.from_source(source)
    reader = None if pictures_fit else WindowReader(source, cache_bytes=max(limit, 0), num_workers=num_workers)

    def rows(key: str) -> SourceRows | np.ndarray:
        if reader is None:
            return _loaded(source, key, cameras[key])
        return SourceRows(reader, key, (num_rows, *cameras[key].shape[1:]))

    infos = [source.info(index) for index in range(source.num_episodes)]
    return EpisodeStore.of_columns({**numbers, **{key: rows(key) for key in cameras}}, infos, reader, source=source)


def _numbers(source: EpisodeSource) -> flat.Flat:
    """Read the numbers of a source that can only read windows."""
    found = {key: flat.FlatRows(key) for key in NUMBERS}
    for index, length in enumerate(source.lengths.tolist()):
        for key, rows in found.items():
            found_rows, name = source.window(index, key, 0, length), source.info(index).source
            rows.append(found_rows if key == "terminals" else as_finite(found_rows, f"{name}: {key}"), name)
    return flat.Flat({key: rows.result() for key, rows in found.items()})


def _camera_keys(source: EpisodeSource) -> list[str]:
    return [IMAGE_PREFIX + camera for camera in source.cameras]


@runtime_checkable
class FilmedSource(Protocol):
    def check_videos(self) -> None:
        """Raise if a video does not have the frames of its episodes, or has another size than the others."""
        ...


def check_videos(source: Any) -> None:
    """Check the videos of a source, if it has any. Call this before reading the pictures of all episodes."""
    if isinstance(source, FilmedSource):
        source.check_videos()


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """The pictures of one camera of all episodes, indexed like an array by row numbers or a slice."""

    reader: WindowReader
    key: str
    shape: tuple[int, ...]
    nbytes: int = 0  # the reader counts its own cache

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Int[np.ndarray, "*shape"] | slice) -> np.ndarray:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return self.reader.read(self.key, wanted.ravel()).reshape(*wanted.shape, *self.shape[1:])


class WindowReader:
    """A reader of pictures by number, counted over all episodes of a source. Threads may share it; they take turns.

    Args:
        cache_bytes: limit of the pictures kept in memory.
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
        """Return the rows in the order of ``rows``, which may repeat numbers."""
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


_Job = tuple[int, str, np.ndarray]  # episode, key, steps in ascending order


@dataclasses.dataclass(frozen=True)
class _Group:
    """The rows of one episode that a read asks for."""

    episode: int
    places: Int[np.ndarray, " n"]  # positions in the result
    steps: Int[np.ndarray, " n"]  # ascending, possibly repeated


class _Held:
    """A cache of rows by key, episode and step; when it is full, the least recently used episode is dropped."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._rows: OrderedDict[tuple[str, int], dict[int, np.ndarray]] = OrderedDict()

    def get(self, key: str, episode: int) -> Mapping[int, np.ndarray]:
        return self._rows.get((key, episode), {})

    def add(self, key: str, episode: int, rows: Mapping[int, np.ndarray]) -> None:
        """Add rows of an episode and mark it as used."""
        kept = self._rows.setdefault((key, episode), {})
        self._rows.move_to_end((key, episode))
        for step, row in rows.items():
            kept[step] = row.copy()  # a view would keep the whole block in memory
            self._nbytes += row.nbytes
        while self._nbytes > self._max_bytes:
            self._nbytes -= sum(row.nbytes for row in self._rows.popitem(last=False)[1].values())


def _missing(group: _Group, kept: Mapping[int, np.ndarray]) -> Int[np.ndarray, " n"]:
    steps = np.unique(group.steps)
    return steps[[step not in kept for step in steps.tolist()]] if kept else steps


def _fetch(source: EpisodeSource, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
    """Read the steps, one window for each run of consecutive ones."""
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
    """Load all rows of one key into memory."""
    rows = np.empty((int(np.sum(source.lengths)), *like.shape[1:]), like.dtype)
    end = 0
    for index, length in enumerate(source.lengths.tolist()):
        rows[end : end + length] = source.window(index, key, 0, length)
        end += length
    return rows
