"""LeRobot datasets, v2.0, v2.1 and v3.0, read from their files: an ``EpisodeSource``.

Numbers come from parquet columns, pictures from embedded images or from videos by presentation time. Opening a dataset
reads the low-dimensional columns of all its episodes once, to check them; no picture is read until it is asked for.
Row t of ``next.reward``, ``next.success`` holds what followed from the action of row t. ``next.done`` is not used: an
episode ends where its rows end.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image

from acrlpd.data import chunks, lerobot_meta, video
from acrlpd.data.episodes import IMAGE_PREFIX, EpisodeInfo, EpisodeSource, EpisodeStore
from acrlpd.data.frame_cache import FrameCache, FrameOrigin
from acrlpd.data.lerobot_meta import EpisodeRow
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.normalize import MIN_STD, NormStats, RunningStats, with_floor
from acrlpd.data.parquet import ParquetError, ParquetReader
from acrlpd.data.rewards import RewardConfig, label, success_of, success_reward
from acrlpd.data.transforms import Compose, Transform
from acrlpd.types import Episode

TIMESTAMP, INDEX, TASK_INDEX = "timestamp", "index", "task_index"
REWARD, SUCCESS = "next.reward", "next.success"
REQUIRED = (TIMESTAMP, "frame_index", "episode_index", INDEX, TASK_INDEX)
STATE_KEYS = (("observation.state",), ("state",), ("joint_position", "gripper_position"))  # the first that are there
ACTION_KEYS = ("action", "actions")
CAMERA_PREFIXES = ("observation.images.", "observation.")  # left out of a camera's name
FULL_CHECK_BLOCK = 64  # frames

T = TypeVar("T")


class EpisodeError(ValueError):
    """Something is wrong with one episode: it can be skipped."""


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What opening the dataset found out about an episode."""

    row: EpisodeRow
    first: int  # row of the file at which it begins
    tasks: tuple[str, ...]  # texts in the order in which its frames have them; mostly one
    success: bool | None  # as recorded
    reward_values: Float[np.ndarray, " n"] | None  # the different values of next.reward


class LeRobotSource:
    """Episodes of a LeRobot dataset, in the order of their numbers. See ``EpisodeSource``.

    Beside that protocol's keys, ``window`` knows every column and camera by its own name, and ``task``: a text a frame.

    Args:
        root: the dataset's folder, or an object of the ``lerobot`` library's LeRobotDataset (its ``episodes`` count).
        episodes: numbers of those to read, in this order; None reads all. Positions in this selection are what methods
            take as index; ``numbers`` has the stored ones.
        state_keys: columns that, one behind the other, make the state; None looks for the usual ones.
        cameras: names without ``observation.images.``; None takes all, and an empty list opens no picture.
        rewards: None leaves rewards as they are stored, and 0 where none are: good for imitation only.
        on_bad_episode: ``"skip"`` leaves broken episodes out, with a warning that says which and why; ``skipped`` has
            the reasons by number. It looks at every video's packets and every embedded image, without decoding frames.
        tolerance_s: how far a timestamp may be from its place, and a video frame from its timestamp.
        frame_cache: where to look for frames first. Frames then always have the cache's resolution.
    """

    def __init__(
        self,
        root: Any,
        *,
        episodes: Sequence[int] | None = None,
        state_keys: Sequence[str] | None = None,
        action_key: str | None = None,
        cameras: Sequence[str] | None = None,
        rewards: RewardConfig | None = None,
        on_bad_episode: Literal["error", "skip"] = "error",
        tolerance_s: float = 1e-4,
        frame_cache: FrameCache | None = None,
    ):
        if on_bad_episode not in ("error", "skip"):
            raise ValueError(f"on_bad_episode must be 'error' or 'skip', got {on_bad_episode!r}")
        folder, episodes = _opened(root, episodes)
        self.meta = lerobot_meta.read(folder)
        self.state_keys = _state_keys(self.meta, state_keys)
        self.action_key = _action_key(self.meta, action_key)
        self._camera_keys = _camera_keys(self.meta, cameras)
        self.skipped: dict[int, str] = {}
        self._rewards = rewards
        self._on_bad_episode = on_bad_episode
        self._tolerance_s = tolerance_s
        self._frame_cache = frame_cache
        self._parquet = ParquetReader()
        self._videos = video.VideoReaders()
        optional = [key for key in (REWARD, SUCCESS) if key in self.meta.features]
        self._columns = (*dict.fromkeys((*self.state_keys, self.action_key, *REQUIRED, *optional)),)
        self._facts = self._opened_episodes(_selected(self.meta, episodes))
        self.lengths = np.array([facts.row.length for facts in self._facts])

    @property
    def num_episodes(self) -> int:
        return len(self._facts)

    @property
    def numbers(self) -> list[int]:
        """The stored number (``episode_index``) of each episode."""
        return [facts.row.number for facts in self._facts]

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._camera_keys)

    @property
    def fps(self) -> float:
        return self.meta.fps

    def info(self, index: int) -> EpisodeInfo:
        """The task is that of the first frame."""
        facts = self._facts[index]
        success = success_of(self._rewards, facts.success, facts.reward_values, self._threshold)
        return EpisodeInfo(facts.row.length, facts.tasks[0], success, _where(facts.row))

    def episode(self, index: int) -> Episode:
        info = self.info(index)
        rewards, terminals = self._label(self._facts[index])
        return Episode(
            state=self.window(index, "state", 0, info.length),
            actions=self.window(index, "actions", 0, info.length),
            rewards=rewards,
            terminals=terminals,
            task=info.task,
            images={name: self.window(index, IMAGE_PREFIX + name, 0, info.length) for name in self.cameras},
            success=info.success,
            source=info.source,
        )

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        facts = self._facts[index]
        if not 0 <= start <= stop <= facts.row.length:
            raise IndexError(f"{_where(facts.row)}: window {start}..{stop} leaves the episode (0..{facts.row.length})")
        if key == "state":
            return self._numbers(facts, self.state_keys, start, stop)
        if key == "actions":
            return self._numbers(facts, [self.action_key], start, stop)
        if key in ("rewards", "terminals"):
            return self._label(facts)[key == "terminals"][start:stop]
        if key == "task":
            return np.array([self.meta.tasks[at] for at in self._rows(facts, TASK_INDEX)[start:stop].tolist()], np.str_)
        if key.startswith(IMAGE_PREFIX) and key.removeprefix(IMAGE_PREFIX) in self._camera_keys:
            return self._frames(facts, key.removeprefix(IMAGE_PREFIX), start, stop)
        names = {stored: name for name, stored in self._camera_keys.items()}
        if key in names:
            return self._frames(facts, names[key], start, stop)
        return np.array(self._rows(facts, key)[start:stop])

    def frame_origin(self, index: int, camera: str) -> FrameOrigin:
        """For the frame cache."""
        row, key = self._facts[index].row, self._camera_keys[camera]
        name = f"episode_{row.number:06d}"
        if key in row.videos:
            span = row.videos[key]
            return FrameOrigin(name, span.path, f"{span.start_s!r}:{row.length}")
        return FrameOrigin(name, row.file, f"{self._facts[index].first}:{row.length}")

    def check_frames(self) -> None:
        """Decodes every frame of every camera; raises at the first that is missing, misplaced or damaged."""
        for facts in self._facts:
            for key in self._camera_keys.values():
                for start in range(0, facts.row.length, FULL_CHECK_BLOCK):
                    self._decoded(facts, key, start, min(start + FULL_CHECK_BLOCK, facts.row.length))

    def _numbers(self, facts: _Facts, keys: Sequence[str], start: int, stop: int) -> Float[np.ndarray, "t d"]:
        parts = [self._rows(facts, key)[start:stop].reshape(stop - start, -1) for key in keys]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _rows(self, facts: _Facts, key: str) -> np.ndarray:
        """All rows of an episode in one column, as they are stored."""
        with _blaming(facts.row, facts.row.file):
            table = self._parquet.columns(facts.row.file, self._columns if key in self._columns else (key,))
        return table[key][facts.first : facts.first + facts.row.length]

    def _label(self, facts: _Facts) -> tuple[Float[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        stored = self._rows(facts, REWARD).astype(np.float32).ravel() if REWARD in self._columns else None
        success = success_of(self._rewards, facts.success, stored, self._threshold)
        return label(
            self._rewards,
            facts.row.length,
            success=success,
            stored=stored,
            threshold=self._threshold,
            where=_where(facts.row),
        )

    def _frames(self, facts: _Facts, camera: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        key = self._camera_keys[camera]
        if self._frame_cache is None:
            return self._decoded(facts, key, start, stop)
        origin = self.frame_origin(self._facts.index(facts), camera)
        cached = self._frame_cache.read(camera, origin, facts.row.length, start, stop)
        return self._frame_cache.resize(self._decoded(facts, key, start, stop)) if cached is None else cached

    def _decoded(self, facts: _Facts, key: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        row = facts.row
        if key in row.videos:
            span = row.videos[key]
            with _blaming(row, span.path, key):
                times = self._frame_times(facts, key)[start:stop]
                return self._videos.frames(span.path, times, self._tolerance_s, (span.start_s, span.stop_s))
        with _blaming(row, row.file, key):
            cells = self._parquet.cells(row.file, key, facts.first + start, facts.first + stop)
            return np.stack([_decode_image(cell, start + at) for at, cell in enumerate(cells)])

    def _frame_times(self, facts: _Facts, key: str) -> Float[np.ndarray, " t"]:
        """Where the frames of an episode lie in its mp4, in seconds."""
        return facts.row.videos[key].start_s + self._rows(facts, TIMESTAMP).astype(np.float64).ravel()

    def _opened_episodes(self, rows: Sequence[EpisodeRow]) -> list[_Facts]:
        found = self._kept(rows, lambda row: row, self._check_rows)
        self._check_total_frames()
        if self._on_bad_episode == "skip":
            times: dict[Path, np.ndarray] = {}
            found = self._kept(found, lambda facts: facts.row, lambda facts: self._check_pictures(facts, times))
        self._threshold = success_reward(self._rewards, _reward_values(found))
        found = self._kept(found, lambda facts: facts.row, self._check_rewards)
        self._tell_skipped(len(rows))
        several = [facts.row.number for facts in found if len(facts.tasks) > 1]
        if several:
            warnings.warn(
                f"{self.meta.root}: the task changes inside {len(several)} episodes, {several[:5]} among them. An "
                "episode is given the task of its first frame; window(..., 'task', ...) has that of each frame.",
                stacklevel=3,
            )
        return found

    def _kept(self, items: Iterable[Any], row_of: Callable[[Any], EpisodeRow], check: Callable[[Any], T]) -> list[T]:
        """What ``check`` makes of the items that pass it."""
        kept = []
        for item in items:
            try:
                kept.append(check(item))
            except EpisodeError as error:
                if self._on_bad_episode == "error":
                    raise
                self.skipped[row_of(item).number] = str(error)
        return kept

    def _tell_skipped(self, num_asked: int) -> None:
        reasons = list(self.skipped.values())
        if len(reasons) == num_asked:
            raise ValueError(f"{self.meta.root}: no good episode is left of {num_asked}. The first one: {reasons[0]}")
        for reason in reasons:
            warnings.warn(f"skipped: {reason}", stacklevel=4)
        if reasons:
            numbers = sorted(self.skipped)
            warnings.warn(
                f"{self.meta.root}: left out {len(reasons)} of {num_asked} episodes: {numbers}", stacklevel=4
            )

    def _check_rows(self, row: EpisodeRow) -> _Facts:
        if row.length < 1:
            raise _bad(row, row.file, "the episode is empty: its length in the episode table is 0, expected at least 1")
        with _blaming(row, row.file):
            table = self._parquet.columns(row.file, self._columns)
            first = _first_row(row, table)
            rows = {key: values[first : first + row.length] for key, values in table.items()}
            for key, values in rows.items():
                _check_values(key, values, self.meta.features)
            _check_clock(rows, self.meta.fps, self._tolerance_s)
            self._check_pictures_exist(row)
            success = bool(rows[SUCCESS].any()) if SUCCESS in rows else None
            values = np.unique(rows[REWARD]).astype(np.float32) if REWARD in rows else None
            return _Facts(row, first, self._task_texts(rows[TASK_INDEX]), success, values)

    def _task_texts(self, task_index: np.ndarray) -> tuple[str, ...]:
        indices = list(dict.fromkeys(task_index.ravel().tolist()))
        unknown = [index for index in indices if index not in self.meta.tasks]
        if unknown:
            raise ParquetError(f"task_index: {unknown[0]} is not in {self.meta.tasks_path}")
        return tuple(self.meta.tasks[index] for index in indices)

    def _check_pictures_exist(self, row: EpisodeRow) -> None:
        for key in self._camera_keys.values():
            if key in row.videos and not row.videos[key].path.is_file():
                raise _bad(row, row.videos[key].path, "no such video file", key)
            if key not in row.videos and key not in self._parquet.names(row.file):
                raise _bad(row, row.file, "the column of this camera is missing, though info.json lists it", key)

    def _check_pictures(self, facts: _Facts, times: dict[Path, np.ndarray]) -> _Facts:
        """Looks whether all frames are there and whole. ``times`` keeps what was learnt of files that episodes share."""
        row = facts.row
        for key in self._camera_keys.values():
            if key in row.videos:
                span = row.videos[key]
                with _blaming(row, span.path, key):
                    if span.path not in times:
                        times[span.path] = video.frame_times(span.path)
                    wanted = self._frame_times(facts, key)
                    video.check_times(times[span.path], wanted, self._tolerance_s, (span.start_s, span.stop_s))
            else:
                with _blaming(row, row.file, key):
                    cells = self._parquet.cells(row.file, key, facts.first, facts.first + row.length)
                    for at, cell in enumerate(cells):
                        _check_image(cell, at)
        return facts

    def _check_rewards(self, facts: _Facts) -> _Facts:
        try:
            self._label(facts)
        except EpisodeError:
            raise
        except ValueError as error:  # nobody knows whether it succeeded, or what its rewards mean
            raise EpisodeError(str(error)) from error
        return facts

    def _check_total_frames(self) -> None:
        """Against the episode table; where that is wrong for one episode, the files themselves decide."""
        by_file: dict[Path, int] = {}
        for row in self.meta.episodes:
            by_file[row.file] = by_file.get(row.file, 0) + row.length
        in_table, total = sum(by_file.values()), self.meta.total_frames
        if in_table == total or sum(self._num_rows(path, length) for path, length in by_file.items()) == total:
            return
        raise ValueError(
            f"{self.meta.info_path}: total_frames is {total}, but the episode table adds up to {in_table} frames. "
            "One of the two files is out of date."
        )

    def _num_rows(self, path: Path, otherwise: int) -> int:
        try:
            return self._parquet.num_rows(path)
        except ParquetError:
            return otherwise


def download(repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Copies a dataset from the Hugging Face hub into ``folder``; what is there already is not copied again."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("downloading datasets needs huggingface-hub: pip install 'acrlpd[remote]'") from error
    name = repo_id.removeprefix("hf://").removeprefix("datasets/")
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_dir=folder))


def source_stats(
    source: EpisodeSource,
    transform: Transform | None = None,
    *,
    horizon: int = 1,
    num_episodes: int | None = None,
    min_std: float = MIN_STD,
) -> dict[str, NormStats]:
    """Statistics of ``state`` and ``actions`` for normalization, as ``normalize.from_store``, but an episode at a time.

    No picture is read: a ``transform`` (what comes before normalization) is shown black ones. ``num_episodes`` takes so
    many, evenly spread. Quantiles come from histograms.
    """
    spread = np.linspace(0, source.num_episodes - 1, min(num_episodes or source.num_episodes, source.num_episodes))
    running = {"state": RunningStats(), "actions": RunningStats()}
    for index in np.unique(spread.round().astype(int)).tolist():
        store = EpisodeStore.from_episodes([_without_pictures(source, index)])
        data: dict[str, Any] = {"state": store.state, "actions": store.actions}
        if transform is not None:
            batch = chunks.gather(store, np.arange(store.num_rows), horizon)
            data = transform({key: batch[key] for key in ("state", "actions", "image", "prompt")})
        for key, stats in running.items():
            stats.update(np.asarray(data[key], np.float64))
    return {key: with_floor(stats.result(), key, min_std=min_std) for key, stats in running.items()}


class LeRobotACRLPDDataLoader(ChunkLoader):
    """A ``ChunkLoader`` of all episodes of a LeRobot dataset, held in memory: its name in the founding design.

    Args:
        lerobot_dataset: a folder, an object of the ``lerobot`` library, or a ``LeRobotSource``.
        transform: from the dataset's units to the model's; None hands out raw numbers.
        source_options: see ``LeRobotSource``; not together with a source.
    """

    def __init__(
        self,
        lerobot_dataset: Any,
        batch_size: int,
        horizon_length: int,
        *,
        transform: Transform | None = None,
        sequence_ratio: float = 0.5,
        seed: int = 0,
        **source_options: Any,
    ):
        given = isinstance(lerobot_dataset, LeRobotSource)
        if given and source_options:
            raise ValueError(f"give {', '.join(source_options)} to the LeRobotSource itself")
        self.source = lerobot_dataset if given else LeRobotSource(lerobot_dataset, **source_options)
        super().__init__(
            EpisodeStore.from_source(self.source),
            Compose(()) if transform is None else transform,
            batch_size=batch_size,
            horizon=horizon_length,
            sequence_ratio=sequence_ratio,
            seed=seed,
        )


def create_lerobot_acrlpd_dataloader(
    lerobot_dataset: Any, batch_size: int, horizon_length: int, **options: Any
) -> LeRobotACRLPDDataLoader:
    """Founding name of ``LeRobotACRLPDDataLoader``'s constructor, which has the options."""
    return LeRobotACRLPDDataLoader(lerobot_dataset, batch_size, horizon_length, **options)


def _opened(root: Any, episodes: Sequence[int] | None) -> tuple[Path, Sequence[int] | None]:
    """Folder and selection from a path or from a LeRobotDataset, which is known by its attributes."""
    if not isinstance(root, (str, os.PathLike)):
        folder = getattr(root, "root", None) or getattr(getattr(root, "meta", None), "root", None)
        if folder is None:
            raise TypeError(f"expected a folder or a LeRobotDataset, got {type(root).__name__} without root or meta")
        return _opened(Path(folder), getattr(root, "episodes", None) if episodes is None else episodes)
    folder = Path(root)
    if folder.is_dir():
        return folder, episodes
    name = str(root).removeprefix("hf://").removeprefix("datasets/")
    if str(root).startswith("hf://") or re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
        raise FileNotFoundError(
            f"{root}: no such folder. If it is a dataset on the Hugging Face hub, copy it first: "
            f"acrlpd.data.lerobot.download({name!r}, 'some/folder') (needs pip install 'acrlpd[remote]') and open that."
        )
    raise FileNotFoundError(f"{root}: no such folder. Point root at the folder that holds meta/info.json.")


def _selected(meta: lerobot_meta.Meta, episodes: Sequence[int] | None) -> list[EpisodeRow]:
    if episodes is None:
        return meta.episodes
    unknown = [number for number in episodes if not 0 <= number < len(meta.episodes)]
    if unknown or len(set(episodes)) < len(episodes) or not episodes:
        raise ValueError(
            f"{meta.root}: episodes must be different numbers in 0..{len(meta.episodes) - 1}, got {list(episodes)}"
        )
    return [meta.episodes[number] for number in episodes]


def _state_keys(meta: lerobot_meta.Meta, asked: Sequence[str] | None) -> tuple[str, ...]:
    usual = [keys for keys in STATE_KEYS if all(key in meta.features for key in keys)]
    keys = usual[0] if asked is None and usual else tuple(asked or ())
    return _numeric(meta, "state_keys", keys)


def _action_key(meta: lerobot_meta.Meta, asked: str | None) -> str:
    usual = [key for key in ACTION_KEYS if key in meta.features]
    keys = usual[:1] if asked is None else [asked]
    return _numeric(meta, "action_key", keys)[0]


def _numeric(meta: lerobot_meta.Meta, name: str, keys: Sequence[str]) -> tuple[str, ...]:
    there = [key for key in meta.features if meta.numeric(key) and key not in REQUIRED]
    unknown = [key for key in keys if key not in there]
    if unknown or not keys:
        wrong = f"{unknown} are not among them" if unknown else "none has a usual name"
        raise ValueError(f"{meta.info_path}: {name}: the numeric features are {', '.join(there)}; {wrong}. Name {name}.")
    return tuple(keys)


def _camera_keys(meta: lerobot_meta.Meta, asked: Sequence[str] | None) -> dict[str, str]:
    """Feature by the camera's name: without prefix, unless two cameras would then have the same name."""
    short = {key: _camera_name(key) for key in meta.cameras}
    names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    keys = {name: key for key, name in names.items()}
    unknown = [name for name in asked or () if name not in keys]
    if unknown:
        raise ValueError(f"{meta.info_path}: no camera {', '.join(unknown)}; the cameras are {', '.join(keys)}")
    return keys if asked is None else {name: keys[name] for name in asked}


def _camera_name(key: str) -> str:
    for prefix in CAMERA_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _where(row: EpisodeRow) -> str:
    return f"{row.file}: episode {row.number}"


def _bad(row: EpisodeRow, file: Path, text: str, key: str | None = None) -> EpisodeError:
    return EpisodeError(f"{file}: episode {row.number}: {'' if key is None else key + ': '}{text}")


class _blaming:  # noqa: N801 - reads as a statement
    """Adds file, episode and key to errors that only know what is wrong."""

    def __init__(self, row: EpisodeRow, file: Path, key: str | None = None):
        self._place = (row, file)
        self._key = key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (ParquetError, video.VideoError)):
            raise _bad(*self._place, str(error), self._key) from error


def _first_row(row: EpisodeRow, table: dict[str, np.ndarray]) -> int:
    """Where in its file an episode begins; raises unless it has exactly the rows that the table gives it."""
    num_rows = len(table[INDEX])
    if row.indices is None:
        if num_rows != row.length:
            raise ParquetError(f"the episode table gives it length {row.length}, but the file has {num_rows} rows")
        return 0
    start, stop = row.indices
    stated = f"dataset_from_index {start} to dataset_to_index {stop}"
    if stop - start != row.length:
        raise ParquetError(f"{stated} are {stop - start} rows, but its length is {row.length}")
    own = np.flatnonzero(table["episode_index"] == row.number)
    if len(own) != row.length or not np.array_equal(table[INDEX][own], np.arange(start, stop)):
        indices = table[INDEX][own]
        found = f"{len(own)} rows, index {indices[0]} to {indices[-1] + 1}" if len(own) else "none"
        raise ParquetError(f"the episode table gives it {stated}; the file has {found} with this episode_index")
    return int(own[0])


def _check_values(key: str, values: np.ndarray, features: dict[str, dict[str, Any]]) -> None:
    """Shape, kind of number, and that all are finite."""
    if key not in features:
        raise ParquetError(f"{key}: info.json does not list this column")
    shape, dtype = tuple(features[key]["shape"]), np.dtype(features[key]["dtype"])
    allowed = ((), (1,)) if shape in ((), (1,)) else (shape,)  # a feature of one number is stored as a plain column
    if values.shape[1:] not in allowed:
        raise ParquetError(f"{key}: expected shape {shape} in every frame, as in info.json, found {values.shape[1:]}")
    if values.dtype.kind != dtype.kind:
        raise ParquetError(f"{key}: expected {dtype}, as in info.json, found {values.dtype}")
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        frame = int(np.argmin(finite))
        raise ParquetError(f"{key}: expected finite numbers, found nan or inf in frame {frame}")


def _check_clock(rows: dict[str, np.ndarray], fps: float, tolerance_s: float) -> None:
    """``frame_index`` counts from 0, and every timestamp lies 1/fps after the one before it."""
    length = len(rows[TIMESTAMP])
    if not np.array_equal(rows["frame_index"].ravel(), np.arange(length)):
        raise ParquetError(f"frame_index: expected 0 to {length - 1} in order, found {rows['frame_index'].ravel()}")
    steps = np.diff(rows[TIMESTAMP].astype(np.float64).ravel())
    wrong = np.abs(steps - 1 / fps) > tolerance_s
    if wrong.any():
        frame = int(np.argmax(wrong))
        raise ParquetError(
            f"timestamp: expected steps of 1/fps = {1 / fps:.6f} s (fps {fps:g}, tolerance {tolerance_s:g} s), found "
            f"{steps[frame]:.6f} s from frame {frame} to {frame + 1}"
        )


def _reward_values(found: Iterable[_Facts]) -> list[np.ndarray]:
    return [facts.reward_values for facts in found if facts.reward_values is not None]


def _decode_image(cell: dict[str, Any] | None, frame: int) -> UInt8[np.ndarray, "h w 3"]:
    with _opened_image(cell, frame) as image:
        return np.asarray(image.convert("RGB"))


def _check_image(cell: dict[str, Any] | None, frame: int) -> None:
    """PNG has check sums, which are enough; other formats have to be decoded."""
    with _opened_image(cell, frame) as image:
        image.verify() if image.format == "PNG" else image.load()


class _opened_image:  # noqa: N801 - reads as a statement
    """The picture in a cell ``{bytes, path}``; damage becomes an error that names the frame."""

    def __init__(self, cell: dict[str, Any] | None, frame: int):
        self._cell = cell or {}
        self._frame = frame

    def __enter__(self) -> Image.Image:
        content = self._cell.get("bytes")
        if not content:
            raise ParquetError(f"frame {self._frame}: no image is embedded (its path: {self._cell.get('path')})")
        try:
            return Image.open(io.BytesIO(content))
        except (OSError, SyntaxError, ValueError) as error:
            raise self._damaged(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, SyntaxError, ValueError, struct.error)):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> ParquetError:
        return ParquetError(f"frame {self._frame}: the embedded image does not decode ({error})")


def _without_pictures(source: EpisodeSource, index: int) -> Episode:
    """State and actions of an episode; its cameras show one black pixel, for transforms that expect them."""
    info = source.info(index)
    return Episode(
        state=source.window(index, "state", 0, info.length),
        actions=source.window(index, "actions", 0, info.length),
        rewards=np.zeros(info.length, np.float32),
        terminals=np.zeros(info.length, bool),
        task=info.task,
        images={name: np.zeros((info.length, 1, 1, 3), np.uint8) for name in getattr(source, "cameras", ())},
        success=info.success,
        source=info.source,
    )
