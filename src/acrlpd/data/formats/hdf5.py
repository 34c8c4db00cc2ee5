"""An ``EpisodeSource`` of recorded episodes in HDF5, in any of several layouts.

The content of the files tells the layout: our own (``layouts/own.py``, which also writes), ALOHA and ACT, robomimic and
LIBERO, DROID's raw folders. Each module in ``layouts`` describes one, with its conventions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from jaxtyping import Bool, Float, Shaped

from acrlpd.data.formats.frame_cache import FrameCache, FrameOrigin
from acrlpd.data.formats.layouts import droid
from acrlpd.data.formats.layouts.aloha import Aloha
from acrlpd.data.formats.layouts.columns import DatasetPictures, Layout, Options, Pictures, Reading, Record, find
from acrlpd.data.formats.layouts.droid import Droid
from acrlpd.data.formats.layouts.mp4 import Video
from acrlpd.data.formats.layouts.own import (
    FORMAT,
    SUFFIXES,
    Own,
    episode_number,
    episode_path,
    read_episode,
    read_metadata,
    write_episode,
)
from acrlpd.data.formats.layouts.robomimic import Robomimic
from acrlpd.data.formats.rewards import Labeller, RewardConfig
from acrlpd.data.formats.video import VideoReaders
from acrlpd.data.store import flat, processes
from acrlpd.data.store.episodes import (
    IMAGE_PREFIX,
    KNOWN_SUCCESS,
    NUMBERS,
    BadEpisodes,
    EpisodeInfo,
    check_alike,
    check_is_read,
    usual_features,
    whole_episode,
)
from acrlpd.data.store.metadata_cache import Arrays, MetadataCache, pack, unpack
from acrlpd.files import listed
from acrlpd.types import Episode

__all__ = [
    "FORMAT",
    "SUFFIXES",
    "H5DatasetReader",
    "episode_number",
    "episode_path",
    "read_episode",
    "read_metadata",
    "write_episode",
]

PARALLEL_FROM = 500  # min number of episodes for processes; reading fewer is faster than starting a process
SCANNED_AT_ONCE = 32  # episodes that a process gets at a time
MAX_DECODED = 4096  # max number of episodes whose columns are kept as objects; all others stay text
DECODE_BLOCK = 64  # pictures decoded at a time when all are checked


def _known(episode_metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return what is known of all episodes, if it has no other names than ``fps`` and ``task``."""
    known = episode_metadata or {}
    if unknown := known.keys() - {"fps", "task"}:
        raise ValueError(f"episode_metadata has {', '.join(sorted(unknown))}: expected fps, task or both")
    return known


class H5DatasetReader:
    """An ``EpisodeSource`` of a folder or file in any supported layout.

    Opening checks every number (state, actions, rewards), the lengths of all keys, that all episodes have the same
    widths and cameras, and that every video opens. Afterwards ``window`` reads only the requested rows. Pictures are
    decoded then, and a damaged one is an error then, unless ``check_images`` decodes all of them when opening.

    Args:
        data_dir: a folder of episode files, a robomimic file (or a folder of LIBERO's), or the root of a DROID tree.
        episode_metadata: ``fps`` and ``task`` of all episodes; an alternative to ``fps`` and ``default_task``.
        filter_key: robomimic's name for a subset of the demos.
        on_bad_episode: ``"skip"`` leaves out episodes that cannot be used, with a warning; see ``skipped``.
        rewards: how rewards are assigned. None keeps stored rewards, and 0 if there are none (good for imitation only).
        fps: the rate, for formats that do not state it or state a wrong one.
        default_task: the instruction of episodes whose format has none.
        state_keys, action_keys: the format's names of the keys to put side by side; None takes those of pi0's training.
        cameras: the format's names; None for all.
        check_images: None decodes if bad episodes are skipped, because an episode cannot be left out later.
        align_observations: LIBERO only, see ``layouts/robomimic.py``.
        jpeg_bgr: ALOHA only, for recordings in which red and blue are swapped; the files do not say so.
        drop_idle: DROID only, leaves out the steps at which the operator was not driving.
        num_workers: processes that read the episodes when opening many; 0 reads them in this one. For batches see
            ``windows.open_store``.
        metadata_cache: the cache of the results of opening. None reads every episode each time.
        frame_cache: the cache to read frames from first. All frames then have the cache's resolution.

    Raises:
        ValueError: an episode cannot be used, or the whole set cannot; the error names file, episode and key.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        episode_metadata: Mapping[str, Any] | None = None,
        *,
        filter_key: str | None = None,
        on_bad_episode: Literal["error", "skip"] = "error",
        rewards: RewardConfig | None = None,
        fps: float | None = None,
        default_task: str = "",
        state_keys: Sequence[str] | None = None,
        action_keys: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        check_images: bool | None = None,
        align_observations: bool = False,
        jpeg_bgr: bool = False,
        drop_idle: bool = False,
        num_workers: int = 0,
        metadata_cache: MetadataCache | None = None,
        frame_cache: FrameCache | None = None,
    ):
        self.path = Path(data_dir)
        known = _known(episode_metadata)
        options = Options(
            fps=known.get("fps") if fps is None else fps,
            default_task=default_task or known.get("task", ""),
            state_keys=None if state_keys is None else tuple(state_keys),
            action_keys=None if action_keys is None else tuple(action_keys),
            cameras=None if cameras is None else tuple(cameras),
            filter_key=filter_key,
            align_observations=align_observations,
            jpeg_bgr=jpeg_bgr,
            drop_idle=drop_idle,
        )
        check_images = on_bad_episode == "skip" if check_images is None else check_images

        def find_out() -> Arrays:
            bad = BadEpisodes(on_bad_episode)
            folder = metadata_cache.folder if metadata_cache else None
            return _find_out(self.path, options, bad, rewards, check_images, num_workers, folder)

        asked = (options, on_bad_episode, rewards, check_images)
        opened = metadata_cache.get(self.path, asked, find_out) if metadata_cache and self.path.exists() else find_out()
        facts = unpack(opened["facts"])
        self.format: str = facts["layout"]
        self.fps: float | None = facts["fps"]  # None if unknown
        self.skipped = [tuple(entry) for entry in facts["skipped"]]  # source and reason of each episode left out
        self.left_out: list[str] = facts["left_out"]  # keys that are not read, each with a reason or its size
        self.indices = tuple(opened["indices"].tolist())  # index of each episode before any was skipped
        self.lengths = opened["lengths"]
        self._facts = facts
        self._task_changes = {index: tuple(map(tuple, changes)) for index, changes in facts["task_changes"]}
        self.flat = flat.Flat({key: opened.pop(key) for key in NUMBERS})
        self._opened = opened
        self._ends = np.cumsum(self.lengths)
        self._frame_cache = frame_cache
        self._videos = VideoReaders()
        self._decoded: dict[int, dict[str, Pictures]] = {}
        self.state_dim: int = self.flat["state"].shape[1]
        self.action_dim: int = self.flat["actions"].shape[1]
        self.cameras = tuple(key.removeprefix(IMAGE_PREFIX) for key in self._pictures(0))

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    def __len__(self) -> int:
        return self.num_episodes

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(index) for index in range(self.num_episodes))

    def info(self, index: int) -> EpisodeInfo:
        task = self._facts["tasks"][self._opened["tasks"][index]]
        success = KNOWN_SUCCESS[self._opened["success"][index]]
        source, changes = self._facts["sources"][index], self._task_changes.get(index, ())
        return EpisodeInfo(int(self.lengths[index]), task, success, source, changes)

    @property
    def untold_tasks(self) -> list[str]:
        """Descriptions that distinguish the tasks without a text."""
        return self._facts["untold_tasks"]

    def episode(self, index: int) -> Episode:
        return whole_episode(self, index)

    @property
    def has_final(self) -> Bool[np.ndarray, " n"]:
        return self._opened["has_final"]

    def final(self, index: int, key: str) -> Shaped[np.ndarray, "*shape"]:
        if key == "state":
            return self._opened["final_state"][np.sum(self.has_final[:index])].copy()
        row = self._stored(index, "final")[key].read(0, 1)
        return (self._frame_cache.resize(row) if self._frame_cache else row)[0]

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        length = int(self.lengths[index])
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.info(index).source}: window {start}..{stop} leaves the episode (0..{length})")
        if key in self.flat:
            first = int(self._ends[index]) - length
            return self.flat.window(key, first + start, first + stop)
        pictures = self._pictures(index)
        if key not in pictures:
            source = self.info(index).source
            check_is_read(source, key, self.left_out)
            raise KeyError(f"{source}: no key {key!r}; it has {', '.join((*self.flat, *pictures))}")
        if self._frame_cache is None:
            return pictures[key].read(start, stop)
        camera = key.removeprefix(IMAGE_PREFIX)
        cached = self._frame_cache.read(camera, self._origin(index, pictures[key]), length, start, stop)
        return self._frame_cache.resize(pictures[key].read(start, stop)) if cached is None else cached

    def frame_origin(self, index: int, camera: str) -> FrameOrigin:
        """Return the file from which the frames of a camera come, for the frame cache."""
        return self._origin(index, self._pictures(index)[IMAGE_PREFIX + camera])

    def _origin(self, index: int, pictures: Pictures) -> FrameOrigin:
        """Identify frames by the place of their pictures, without the path: the data set may be moved."""
        stretch = json.dumps({"": pictures.encoded()}).replace(json.dumps(str(pictures.path)), "")
        place = self.info(index).source.removeprefix(str(self.path)) or self.path.name  # the file, and the demo in it
        words = "_".join(re.findall(r"[\w.]+", place, re.ASCII))[-80:]
        return FrameOrigin(f"{words}-{hashlib.sha256(place.encode()).hexdigest()[:8]}", pictures.path, stretch)

    def _pictures(self, index: int) -> dict[str, Pictures]:
        if index not in self._decoded:
            if len(self._decoded) >= MAX_DECODED:
                self._decoded = {}
            self._decoded[index] = self._stored(index, "pictures")
        return self._decoded[index]

    def _stored(self, index: int, name: Literal["pictures", "final"]) -> dict[str, Pictures]:
        end = self._opened[f"{name}_ends"]
        start = end[index - 1] if index else 0
        places = json.loads(self._opened[name][start : end[index]].tobytes())
        return {key: _decoded(encoded, self._videos) for key, encoded in places.items()}


def _decoded(encoded: list[Any], videos: VideoReaders) -> Pictures:
    """Return what ``Pictures.encoded`` described. All videos share readers, which limits the number of open files."""
    if encoded[0] == "picked":
        return dataclasses.replace(_decoded(encoded[1], videos), picks=tuple(encoded[2]))
    return Video.decode(encoded, videos) if encoded[0] == "video" else DatasetPictures.decode(encoded)


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """A kept episode with its rewards and terminals."""

    record: Record
    info: EpisodeInfo
    rewards: Float[np.ndarray, " t"]
    terminals: Bool[np.ndarray, " t"]


def _find_out(
    path: Path,
    options: Options,
    bad: BadEpisodes,
    rewards: RewardConfig | None,
    check_images: bool,
    num_workers: int,
    folder: Path | None,
) -> Arrays:
    """Scan a data set and return all that a reader knows before it reads pictures, in the form of a cache entry."""
    layout = _open_layout(path, options)
    numbers = {key: flat.FlatRows(key, folder) for key in NUMBERS}
    scanned = _scan(layout, bad, numbers, check_images=check_images, num_workers=num_workers)
    episodes = _labelled(layout, _alike(layout, scanned, bad), bad, rewards)
    bad.report(str(path), len(layout.sources))
    infos = [episode.info for episode in episodes.values()]
    tasks = {task: number for number, task in enumerate(dict.fromkeys(info.task for info in infos))}
    places = {
        "pictures": [_encoded(episode.record.pictures) for episode in episodes.values()],
        "final": [_encoded(episode.record.final_pictures) for episode in episodes.values()],
    }
    final_state = [each.record.final_state.values for each in episodes.values() if each.record.final_state is not None]
    kept = [position for position, index in enumerate(scanned) if index in episodes]
    for key in ("state", "actions"):
        numbers[key].keep(kept)
    for episode in episodes.values():
        numbers["rewards"].append(episode.rewards, episode.info.source)
        numbers["terminals"].append(episode.terminals, episode.info.source)
    facts = {
        "layout": layout.name,
        "fps": layout.fps,
        "skipped": bad.skipped,
        "left_out": _left_out(layout, {index: episode.record for index, episode in episodes.items()}),
        "tasks": list(tasks),
        "sources": [info.source for info in infos],
        "task_changes": [(index, info.task_changes) for index, info in enumerate(infos) if info.task_changes],
        "untold_tasks": sorted(
            {
                each.record.task_mark
                for each in episodes.values()
                if each.record.task_mark and not each.info.task.strip()
            }
        ),
    }
    return {
        "facts": pack(facts),
        "indices": np.array(list(episodes)),
        "lengths": np.array([info.length for info in infos]),
        "tasks": np.array([tasks[info.task] for info in infos]),
        "success": np.array([KNOWN_SUCCESS.index(info.success) for info in infos], np.int8),
        "has_final": np.array([episode.record.final_state is not None for episode in episodes.values()]),
        "final_state": np.concatenate(final_state) if final_state else np.zeros((0, 1), np.float32),
        **{name: np.frombuffer(b"".join(texts), np.uint8) for name, texts in places.items()},
        **{f"{name}_ends": np.cumsum([len(text) for text in texts]) for name, texts in places.items()},
        **{key: rows.result() for key, rows in numbers.items()},
    }


def _encoded(pictures: Mapping[str, Pictures]) -> bytes:
    """Return the places of an episode's pictures as JSON: a hundred thousand objects would take memory and time."""
    return json.dumps({key: each.encoded() for key, each in pictures.items()}).encode()


def _left_out(layout: Layout, records: Mapping[int, Record]) -> list[str]:
    """Return the cameras of any episode that are not read, and the unused keys of the first episode."""
    cameras = [f"{camera} ({why})" for record in records.values() for camera, why in record.left_out.items()]
    return [*dict.fromkeys(cameras), *layout.unused(next(iter(records)))]


def _scan(
    layout: Layout, bad: BadEpisodes, numbers: Mapping[str, flat.FlatRows], *, check_images: bool, num_workers: int
) -> dict[int, Record]:
    """Return the usable episodes by index. Their states and actions are added to ``numbers``."""
    records: dict[int, Record] = {}
    scanned = _scanned(layout, check_images=check_images, num_workers=num_workers)
    with contextlib.closing(scanned):
        for index, found in enumerate(scanned):
            record = None
            with bad.guard(layout.sources[index]):
                record = found.get()
            if record is not None:
                for key, joined in record.numbers.items():
                    numbers[key].append(joined.values, layout.sources[index])
                records[index] = record.without_numbers()
    return records


class _Scanned(NamedTuple):
    """The result of scanning an episode; ``get`` repeats its warnings and its error in the calling process."""

    record: Record | None
    error: Exception | None
    warnings: list[str]

    def get(self) -> Record:
        for text in self.warnings:
            warnings.warn(text, stacklevel=2)
        if self.error is not None:
            raise self.error
        assert self.record is not None, "no error"
        return self.record


def _scanned(layout: Layout, *, check_images: bool, num_workers: int) -> Generator[_Scanned, None, None]:
    count = len(layout.sources)
    if num_workers == 0 or count < PARALLEL_FROM:
        yield from (_scan_one(layout, index, check_images) for index in range(count))
        return
    pool = processes.start(num_workers, _adopt, layout, check_images)
    try:
        with processes.explained(num_workers):
            yield from pool.map(_scan_adopted, range(count), chunksize=SCANNED_AT_ONCE)
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_one(layout: Layout, index: int, check_images: bool) -> _Scanned:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            record, error = layout.scan(index), None
            if check_images:
                _decode_all(record)
        except (ValueError, OSError) as failure:
            record, error = None, failure
    return _Scanned(record, error, [str(warning.message) for warning in caught])


_adopted: Any = None  # in a worker process: the layout to scan, and whether to check pictures


def _adopt(layout: Layout, check_images: bool) -> None:
    global _adopted
    _adopted = layout, check_images


def _scan_adopted(index: int) -> _Scanned:
    layout, check_images = _adopted
    return _scan_one(layout, index, check_images)


def _decode_all(record: Record) -> None:
    """Read every picture once, a block at a time: raw pictures of a whole episode may not fit into memory."""
    for pictures in record.pictures.values():
        for start in range(0, len(pictures), DECODE_BLOCK):
            pictures.read(start, min(start + DECODE_BLOCK, len(pictures)))


def _alike(layout: Layout, records: dict[int, Record], bad: BadEpisodes) -> dict[int, Record]:
    """Return the episodes that have the shapes, dtype kinds and cameras of the majority."""
    features = {index: record.features for index, record in records.items()}
    usual = usual_features(features.values())
    alike = {}
    for index, record in records.items():
        with bad.guard(layout.sources[index]):
            for camera in record.left_out.keys() & usual.keys():
                raise ValueError(f"{layout.sources[index]}: {camera}: {record.left_out[camera]}")
            check_alike(features, index, usual, layout.sources.__getitem__, _described)
            alike[index] = record
    return alike


def _described(feature: tuple[tuple[int, ...], str] | None) -> str:
    if feature is None:
        return "nothing"
    shape, kind = feature
    return f"rows of shape {shape} and dtype kind {kind!r}"


def _labelled(
    layout: Layout, records: dict[int, Record], bad: BadEpisodes, config: RewardConfig | None
) -> dict[int, _Labelled]:
    stored = [record.rewards for record in records.values() if record.rewards is not None]
    labeller = Labeller.of(config, stored)
    labelled = {}
    for index, record in records.items():
        source, own = layout.sources[index], record.terminals
        # zeros mean failure in robomimic; in our own layout they may also mean that rewards are unknown
        rewards = record.rewards if labeller.are_known or own is None else None
        with bad.guard(source):
            success = labeller.success(record.success, rewards, has_terminals=own is not None)
            rewards, terminals = labeller.label(
                len(record), success=success, stored=rewards, terminals=own, where=source
            )
            info = EpisodeInfo(len(record), record.task, success, source, record.task_changes)
            labelled[index] = _Labelled(record, info, rewards, terminals)
    return labelled


def _open_layout(path: Path, options: Options) -> Layout:
    """Detect the layout from the first file that can be read."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        named = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
        files = [file for file in named if not file.is_dir()]
        files = [] if path / droid.FILE in files else files
    else:
        raise FileNotFoundError(f"{path}: no such file or folder. Point it at recorded episodes.")
    if not files:
        if not any(droid.trajectories(path)):
            raise ValueError(
                f"{path}: expected files named episode_*.hdf5, a robomimic file, or DROID's folders with "
                f"{droid.FILE}, found none. Record some with `acrlpd collect`, or point it at the folder that holds "
                "them."
            )
        return Droid(path, options)
    files.sort(key=lambda file: file.name)
    make = next((kind for kind in map(_kind, files) if kind is not None), None)
    if make is None:
        with Reading(files[0]) as file:
            raise ValueError(
                f"{files[0]}: expected the layout of acrlpd, ALOHA/ACT, robomimic or LIBERO, found the keys "
                f"[{listed(map(repr, sorted(file)))}]. It has another layout, which this reader does not know."
            )
    return make(files if make is Robomimic else _numbered(files), options)


def _kind(path: Path) -> Callable[[list[Path], Options], Layout] | None:
    """Return the layout of one file; None if it is unreadable or unknown."""
    with contextlib.suppress(ValueError, OSError), Reading(path) as file:
        if np.array_equal(file.attrs.get("format"), FORMAT):
            return Own
        if isinstance(find(str(path), file, "data"), h5py.Group):
            return Robomimic
        if "action" in list(file) or "observations" in list(file):
            return Aloha
    return None


def _numbered(files: list[Path]) -> list[Path]:
    """Sort files by the number that ends their names; gaps are allowed."""
    unnumbered = [path.name for path in files if episode_number(path) is None]
    if unnumbered:
        raise ValueError(f"{files[0].parent}: expected names that end in a number, found {unnumbered[:5]}")

    def order(path: Path) -> tuple[Any, str]:
        return episode_number(path), path.name

    return sorted(files, key=order)
