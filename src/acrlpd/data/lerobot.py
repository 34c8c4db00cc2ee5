"""An ``EpisodeSource`` that reads LeRobot datasets, v2.0, v2.1 and v3.0, from their files.

Numbers come from parquet columns, pictures from embedded images or from videos by presentation time. Opening a dataset
reads the low-dimensional columns of all episodes once, to check them, and looks at one picture of each camera (for a
video: at its header) to check that it is 8-bit colour; no other picture is read until it is asked for.
Row t of ``next.reward`` and ``next.success`` holds the result of the action in row t. ``next.done`` is not used: an
episode ends where its rows end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from acrlpd.data import flat, lerobot_meta, lerobot_stretches, video
from acrlpd.data import lerobot_checks as checks
from acrlpd.data.episodes import (
    IMAGE_PREFIX,
    KNOWN_SUCCESS,
    NUMBERS,
    BadEpisodes,
    EpisodeInfo,
    OptionError,
    check_alike,
    check_is_read,
    first_text,
    usual_features,
)
from acrlpd.data.frame_cache import FrameCache, FrameOrigin
from acrlpd.data.lerobot_meta import REQUIRED, TASK_INDEX, TIMESTAMP, EpisodeRow
from acrlpd.data.metadata_cache import Arrays, MetadataCache, pack, unpack
from acrlpd.data.parquet import DataError, ParquetReader
from acrlpd.data.pictures import PictureError
from acrlpd.data.rewards import RewardConfig, are_known, believes_terminals, label, success_of, success_reward
from acrlpd.files import inside
from acrlpd.types import Episode

REWARD, SUCCESS = "next.reward", "next.success"
TERMINAL = "next.terminal"  # true where the task ended; only datasets that acrlpd wrote have this column
FULL_CHECK_BLOCK = 64  # frames
LOOKED_AT = 3  # episodes to try when checking what kind of pictures a camera has
READERS = 8  # threads that read parquet files
TOLERANCE_S = 1e-4  # the default of the lerobot library


@dataclasses.dataclass(frozen=True)
class _Facts:
    """The facts about an episode that is kept."""

    row: EpisodeRow
    first: int  # row of the file at which the episode begins
    tasks: tuple[tuple[int, int], ...]  # frame and task_index wherever the task changes; usually one entry
    success: bool | None


@dataclasses.dataclass(frozen=True)
class _Checked:
    """The result of reading and checking an episode's numbers."""

    row: EpisodeRow
    first: int
    tasks: tuple[tuple[int, int], ...]  # as in ``_Facts``
    success: bool | None  # as recorded
    reward_values: Float[np.ndarray, " n"] | None  # the different values of next.reward
    sizes: dict[str, tuple[int, int]]  # height and width of the pictures, by feature


class LeRobotSource:
    """Episodes of a LeRobot dataset, in the order of their numbers. See ``EpisodeSource``.

    Besides that protocol's keys, ``window`` accepts every column and camera by its stored name, and ``task``, which
    gives one text per frame.

    Args:
        root: the dataset's folder, or a LeRobotDataset of the ``lerobot`` library. Its selection of ``episodes`` is
            used; its ``delta_timestamps`` and transforms are not.
        episodes: numbers of the episodes to read, in this order; None reads all. Methods take positions in this
            selection as index; ``numbers`` has the stored numbers.
        state_keys, action_keys: columns that are concatenated into the state and the actions; None looks for the usual
            ones.
        cameras: names without ``observation.images.``; None takes all that hold 8-bit colour (no depth), and an empty
            list reads no pictures.
        default_task: the instruction of frames whose task has an empty text.
        rewards: None keeps rewards as stored, and 0 if there are none: good for imitation only.
        on_bad_episode: ``"skip"`` leaves out broken episodes, with a warning that says which and why; see ``skipped``.
        check_images: decode every picture when opening. None decodes if bad episodes are skipped, because an episode
            cannot be left out later. This is slow, but ``metadata_cache`` remembers the result. Skipping without it
            only checks that the frames are there.
        tolerance_s: how far a timestamp may be from its place, and a video frame from its timestamp. None: the
            tolerance of the LeRobotDataset, else 1e-4.
        frame_cache: the cache to read frames from first. All frames then have the cache's resolution.
        metadata_cache: the cache of the results of opening. None reads every episode each time.
    """

    def __init__(
        self,
        root: Any,
        *,
        episodes: Sequence[int] | None = None,
        state_keys: Sequence[str] | None = None,
        action_keys: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        default_task: str = "",
        rewards: RewardConfig | None = None,
        on_bad_episode: Literal["error", "skip"] = "error",
        check_images: bool | None = None,
        tolerance_s: float | None = None,
        frame_cache: FrameCache | None = None,
        metadata_cache: MetadataCache | None = None,
    ):
        folder, episodes = _opened(root, episodes)
        tolerance_s = getattr(root, "tolerance_s", TOLERANCE_S) if tolerance_s is None else tolerance_s
        self.meta = lerobot_meta.read(folder)
        self.robot_type = self.meta.robot_type
        self.state_keys = lerobot_meta.state_keys(self.meta, state_keys)
        self.action_keys = lerobot_meta.action_keys(self.meta, action_keys)
        self._camera_keys, unread = lerobot_meta.camera_keys(self.meta, cameras)
        self._asked_for_cameras = cameras is not None
        self._default_task = default_task
        self._rewards = rewards
        self._tolerance_s = tolerance_s
        self._frame_cache = frame_cache
        self._parquet = ParquetReader()
        self._videos = video.VideoReaders()
        optional = [key for key in (REWARD, SUCCESS, TERMINAL) if key in self.meta.features]
        self._sizes: dict[str, tuple[int, int]] = {}  # size of the pictures, by feature
        self._outlines: dict[Path, video.Outline] = {}  # headers of video files; episodes may share a file
        self._columns = (*dict.fromkeys((*self.state_keys, *self.action_keys, *REQUIRED, *optional)),)
        selected = _selected(self.meta, episodes)
        check_images = on_bad_episode == "skip" if check_images is None else check_images
        self._metadata_cache = metadata_cache
        self._opens_videos = check_images or on_bad_episode == "skip"

        def find_out() -> Arrays:
            return self._find_out(selected, BadEpisodes(on_bad_episode), check_images=check_images)

        numbers = [row.number for row in selected] if episodes is not None else None
        asked = (
            self._columns,
            self._camera_keys,
            cameras is None,
            numbers,
            rewards,
            on_bad_episode,
            check_images,
            tolerance_s,
        )
        opened = metadata_cache.get(folder, asked, find_out) if metadata_cache else find_out()
        facts = unpack(opened["facts"])
        self.skipped = [tuple(entry) for entry in facts["skipped"]]  # name and fault of each episode left out
        self._camera_keys = {name: key for name, key in self._camera_keys.items() if name not in facts["unread"]}
        used = (*self.state_keys, *self.action_keys, *self.meta.cameras)
        self.left_out = [f"{IMAGE_PREFIX}{name} ({why})" for name, why in (unread | facts["unread"]).items()]
        self.left_out += lerobot_meta.unused(self.meta, used)  # columns that are there but not read
        self._sizes = {key: (height, width) for key, (height, width) in facts["sizes"].items()}
        known = zip(*(opened[key].tolist() for key in ("numbers", "firsts", "tasks", "successes")), strict=True)
        changes = {number: tuple(map(tuple, each)) for number, each in facts["task_changes"]}
        self._facts = [
            _Facts(self.meta.episodes[number], first, ((0, task), *changes.get(number, ())), KNOWN_SUCCESS[success])
            for number, first, task, success in known
        ]
        self.lengths = np.array([facts.row.length for facts in self._facts])
        self._ends = np.cumsum(self.lengths)
        self.flat = flat.Flat({key: opened[key] for key in NUMBERS})

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
    def format(self) -> str:
        return f"lerobot {self.meta.version}"

    @property
    def fps(self) -> float:
        return self.meta.fps

    def info(self, index: int) -> EpisodeInfo:
        facts = self._facts[index]
        (_, task), *changes = ((frame, self._text(task)) for frame, task in facts.tasks)
        return EpisodeInfo(facts.row.length, task, facts.success, _where(facts.row), tuple(changes))

    @property
    def untold_tasks(self) -> list[str]:
        """Descriptions that distinguish the tasks without a text."""
        indices = sorted({task for facts in self._facts for _, task in facts.tasks})
        return [f"task_index {task}" for task in indices if not self._text(task).strip()]

    def _text(self, task_index: int) -> str:
        return first_text(self.meta.tasks[task_index], self._default_task)

    def episode(self, index: int) -> Episode:
        info = self.info(index)
        return Episode(
            state=self.window(index, "state", 0, info.length),
            actions=self.window(index, "actions", 0, info.length),
            rewards=self.window(index, "rewards", 0, info.length),
            terminals=self.window(index, "terminals", 0, info.length),
            task=info.task,
            task_changes=info.task_changes,
            images={name: self.window(index, IMAGE_PREFIX + name, 0, info.length) for name in self.cameras},
            success=info.success,
            source=info.source,
        )

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        facts = self._facts[index]
        if not 0 <= start <= stop <= facts.row.length:
            raise IndexError(f"{_where(facts.row)}: window {start}..{stop} leaves the episode (0..{facts.row.length})")
        if key in self.flat:
            first = int(self._ends[index]) - facts.row.length
            return self.flat.window(key, first + start, first + stop)
        if key == "task":
            indices = self._rows(facts, TASK_INDEX)[start:stop].ravel().tolist()
            return np.array([self._text(index) for index in indices], np.str_)
        if key.startswith(IMAGE_PREFIX) and key.removeprefix(IMAGE_PREFIX) in self._camera_keys:
            return self._frames(facts, key.removeprefix(IMAGE_PREFIX), start, stop)
        names = {stored: name for name, stored in self._camera_keys.items()}
        if key in names:
            return self._frames(facts, names[key], start, stop)
        if key.startswith(IMAGE_PREFIX):
            check_is_read(_where(facts.row), key, self.left_out)
        return np.array(self._rows(facts, key)[start:stop])

    def frame_origin(self, index: int, camera: str) -> FrameOrigin:
        """Return the file from which the frames of a camera come, for the frame cache."""
        return self._origin(self._facts[index], camera)

    def _origin(self, facts: _Facts, camera: str) -> FrameOrigin:
        row, key = facts.row, self._camera_keys[camera]
        if key in row.videos:
            span = row.videos[key]
            return FrameOrigin(_name(row), span.path, f"{span.start_s!r}:{row.length}")
        return FrameOrigin(_name(row), row.file, f"{facts.first}:{row.length}")

    def check_frames(self) -> None:
        """Decode every frame of every camera; raise at the first that is missing, misplaced or damaged."""
        for facts in self._facts:
            for key in self._camera_keys.values():
                self._decode_all(facts, key)

    def _decode_all(self, facts: _Facts | _Checked, key: str) -> None:
        for start in range(0, facts.row.length, FULL_CHECK_BLOCK):
            self._decoded(facts, key, start, min(start + FULL_CHECK_BLOCK, facts.row.length))

    def _joined(self, facts: _Facts, keys: Sequence[str]) -> Float[np.ndarray, "t d"]:
        parts = [self._rows(facts, key) for key in keys]
        blocks = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def _rows(self, facts: _Facts | _Checked, key: str) -> np.ndarray:
        """Return all rows of an episode in one column, as they are stored."""
        with _blaming(facts.row, facts.row.file):
            table = self._parquet.columns(facts.row.file, self._columns if key in self._columns else (key,))
        return table[key][facts.first : facts.first + facts.row.length]

    def _label(self, facts: _Facts, threshold: float | None) -> tuple[Float[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        stored = self._rows(facts, REWARD).astype(np.float32).ravel() if self._rewards_are_known else None
        terminals = self._rows(facts, TERMINAL).astype(bool).ravel() if TERMINAL in self._columns else None
        return label(
            self._rewards,
            facts.row.length,
            success=facts.success,
            stored=stored,
            terminals=terminals,
            threshold=threshold,
            where=_where(facts.row),
        )

    def _frames(self, facts: _Facts, camera: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        key = self._camera_keys[camera]
        if self._frame_cache is None:
            return self._decoded(facts, key, start, stop)
        cached = self._frame_cache.read(camera, self._origin(facts, camera), facts.row.length, start, stop)
        return self._frame_cache.resize(self._decoded(facts, key, start, stop)) if cached is None else cached

    def _decoded(self, facts: _Facts | _Checked, key: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        if start == stop:
            return self._decoded(facts, key, 0, 1)[:0]
        row = facts.row
        if key in row.videos:
            span = row.videos[key]
            with _blaming(row, span.path, key):
                times = self._frame_times(facts, key)[start:stop]
                return self._videos.frames(span.path, times, self._tolerance_s, (span.start_s, span.stop_s))
        with _blaming(row, row.file, key):
            cells = self._parquet.cells(row.file, key, facts.first + start, facts.first + stop)
            return checks.decode_images(cells, start, self._sizes[key])

    def _frame_times(self, facts: _Facts | _Checked, key: str) -> Float[np.ndarray, " t"]:
        """Return the times of an episode's frames in its mp4, in seconds.

        Timestamps are rounded to float32, after 17 minutes by more than the tolerance. A timestamp that equals
        frame / fps up to this rounding is replaced by exactly frame / fps.
        """
        stored = self._rows(facts, TIMESTAMP).ravel()
        exact = np.arange(len(stored)) / self.meta.fps
        rounded = np.abs(stored - exact) <= np.spacing(np.abs(stored))
        return facts.row.videos[key].start_s + np.where(rounded, exact, stored.astype(np.float64))

    def _find_out(self, rows: Sequence[EpisodeRow], bad: BadEpisodes, *, check_images: bool) -> Arrays:
        """Check the episodes and return everything to be remembered about the usable ones."""
        good: list[_Checked] = []
        usable = []
        unread = self._not_colour(rows)
        self._camera_keys = {name: key for name, key in self._camera_keys.items() if name not in unread}
        with contextlib.closing(self._checked(rows)) as outcomes:
            for row, outcome in zip(rows, outcomes, strict=True):
                with bad.guard(_name(row)):
                    if isinstance(outcome, Exception):
                        raise outcome
                    good.append(outcome)
        good = self._with_own_stretches(good, bad)
        good = self._with_usual_pictures(good, bad)
        if check_images:
            good = self._with_whole_pictures(good, bad, self._decode_all)
        elif bad.skip:
            good = self._with_whole_pictures(good, bad, functools.partial(self._look_for_frames, {}))
        self._check_total_frames()
        values_of_all = _reward_values(good)
        threshold = success_reward(self._rewards, values_of_all)
        self._rewards_are_known = are_known(self._rewards, values_of_all)
        columns = {key: flat.FlatRows(self._metadata_cache.folder if self._metadata_cache else None) for key in NUMBERS}
        for checked in good:
            labelled = None
            with bad.guard(_name(checked.row)):
                own = TERMINAL in self._columns and believes_terminals(self._rewards)
                values = checked.reward_values if self._rewards_are_known and not own else None
                success = success_of(self._rewards, checked.success, values, threshold)
                facts = _Facts(checked.row, checked.first, checked.tasks, success)
                # fails if the episode's outcome or the meaning of its rewards is unknown
                labelled = self._label(facts, threshold)
            if labelled is not None:
                usable.append((checked, success))
                numbers = (self._joined(facts, self.state_keys), self._joined(facts, self.action_keys), *labelled)
                for column, values in zip(columns.values(), numbers, strict=True):
                    column.append(values)
        bad.report(str(self.meta.root), len(rows))
        changes = [(checked.row.number, checked.tasks[1:]) for checked, _ in usable if len(checked.tasks) > 1]
        return {
            "facts": pack({"skipped": bad.skipped, "sizes": self._sizes, "task_changes": changes, "unread": unread}),
            "numbers": np.array([checked.row.number for checked, _ in usable]),
            "firsts": np.array([checked.first for checked, _ in usable]),
            "tasks": np.array([checked.tasks[0][1] for checked, _ in usable]),
            "successes": np.array([KNOWN_SUCCESS.index(success) for _, success in usable], np.int8),
            **{key: column.result() for key, column in columns.items()},
        }

    def _with_own_stretches(self, found: Sequence[_Checked], bad: BadEpisodes) -> list[_Checked]:
        """Return the episodes that share no row or frame with others, by tables and by headers read so far."""
        faults = lerobot_stretches.row_faults(self.meta, {checked.row.number for checked in found})
        for key in self._video_keys:
            size_of = self._num_frames if bad.skip else None
            of_camera = lerobot_stretches.video_faults(self.meta, key, self._tolerance_s, self._sizes_known, size_of)
            if not of_camera and (text := lerobot_stretches.unusual_order(self.meta, key)) is not None:
                warnings.warn(text, stacklevel=4)
            faults = of_camera | faults
        own = []
        for checked in found:
            with bad.guard(_name(checked.row)):
                if checked.row.number in faults:
                    raise ValueError(faults[checked.row.number])
                own.append(checked)
        return own

    @property
    def _sizes_known(self) -> dict[Path, int]:
        """The number of frames of each video whose header was read."""
        return {path: outline.num_frames for path, outline in self._outlines.items()}

    def _num_frames(self, path: Path) -> int | None:
        """Read the number of frames of a video; None if it does not open, which its episodes report."""
        try:
            return video.outline(path).num_frames
        except video.VideoError:
            return None

    @property
    def _video_keys(self) -> list[str]:
        """The features of the cameras that are stored as videos."""
        return [key for key in self._camera_keys.values() if self.meta.features[key]["dtype"] == "video"]

    def _not_colour(self, rows: Sequence[EpisodeRow]) -> dict[str, str]:
        """Return the reason for each camera whose first picture, or video header, is not 8-bit colour.

        Raises:
            OptionError: the user asked for such a camera.
        """
        reasons = {}
        for name, key in self._camera_keys.items():
            try:
                self._look_at_first(rows, key)
            except PictureError as error:
                if self._asked_for_cameras:
                    raise OptionError(f"{self.meta.root}: {key}: {error}. Leave it out of cameras.") from error
                reasons[name] = str(error)
        return reasons

    def _look_at_first(self, rows: Sequence[EpisodeRow], key: str) -> None:
        """Raise ``PictureError`` if the first readable picture is not 8-bit colour."""
        for row in rows[:LOOKED_AT]:
            try:
                if key in row.videos:
                    video.check_colour(row.videos[key].path)
                else:
                    checks.check_colour(self._parquet.cell(row.file, key, 0))
                return
            except PictureError:
                raise
            except (DataError, video.VideoError, ImportError):  # reported when the episode or the picture is read
                continue

    def _with_usual_pictures(self, found: Sequence[_Checked], bad: BadEpisodes) -> list[_Checked]:
        """Return the episodes whose pictures have the most common size, and store that size."""
        by_number = {checked.row.number: checked for checked in found}
        sizes = {number: checked.sizes for number, checked in by_number.items()}
        self._sizes = usual_features(sizes.values())
        alike = []
        for number, checked in by_number.items():
            with bad.guard(_name(checked.row)):
                check_alike(sizes, number, self._sizes, lambda at: _where(by_number[at].row), checks.told_size)
                alike.append(checked)
        return alike

    def _look_for_frames(self, times_s: dict[Path, np.ndarray], facts: _Checked, key: str) -> None:
        """Check without decoding that all frames of an episode are there; ``times_s`` caches each mp4's frame times."""
        row = facts.row
        if key in row.videos:
            span = row.videos[key]
            with _blaming(row, span.path, key):
                if span.path not in times_s:
                    times_s[span.path] = video.frame_times(span.path)
                wanted, limits = self._frame_times(facts, key), (span.start_s, span.stop_s)
                video.check_times(times_s[span.path], wanted, self._tolerance_s, limits)
        else:
            with _blaming(row, row.file, key):
                cells = self._parquet.cells(row.file, key, facts.first, facts.first + row.length)
                for frame, cell in enumerate(cells):
                    checks.check_image(cell, frame, self._sizes[key])

    def _with_whole_pictures(
        self, found: Sequence[_Checked], bad: BadEpisodes, check: Callable[[_Checked, str], None]
    ) -> list[_Checked]:
        """Return the episodes whose pictures pass ``check``. Several files are read at once, each front to back."""
        files: dict[tuple[str, Path], list[_Checked]] = {}
        for checked in found:
            for key in self._camera_keys.values():
                span = checked.row.videos.get(key)
                files.setdefault((key, checked.row.file if span is None else span.path), []).append(checked)

        def faults_of(key: str, episodes: Sequence[_Checked]) -> dict[int, Exception]:
            """Return the errors, by episode number."""
            faults: dict[int, Exception] = {}
            for checked in episodes:
                try:
                    check(checked, key)
                except (ValueError, OSError) as error:
                    faults[checked.row.number] = error
            return faults

        faults: dict[int, Exception] = {}
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, video.MAX_OPEN_FILES))
        try:
            for some in pool.map(faults_of, (key for key, _ in files), files.values()):
                faults = some | faults
        finally:
            pool.shutdown(cancel_futures=True)
        whole = []
        for checked in found:
            with bad.guard(_name(checked.row)):
                if checked.row.number in faults:
                    raise faults[checked.row.number]
                whole.append(checked)
        return whole

    def _checked(self, rows: Sequence[EpisodeRow]) -> Generator[_Checked | Exception, None, None]:
        """Yield what ``_check_rows`` returns or raises; if each episode has its own file, several are read at once."""

        def attempt(row: EpisodeRow) -> _Checked | Exception:
            try:
                return self._check_rows(row)
            except (ValueError, OSError) as error:
                return error

        pool = ThreadPoolExecutor(READERS if len({row.file for row in rows}) == len(rows) else 1)
        try:
            yield from pool.map(attempt, rows)
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_rows(self, row: EpisodeRow) -> _Checked:
        if row.length < 1:
            raise _bad(row, row.file, "the episode is empty: its length in the episode table is 0, expected at least 1")
        with _blaming(row, row.file):
            table = self._parquet.columns(row.file, self._columns)
            first = checks.first_row(row, table)
            rows = {key: values[first : first + row.length] for key, values in table.items()}
            for key, values in rows.items():
                checks.check_values(key, values, self.meta.features)
            checks.check_clock(rows, self.meta.fps, self._tolerance_s)
            if self._video_keys:
                checks.check_start(rows, self._tolerance_s)
            sizes = self._picture_sizes(row, first)
            success = bool(rows[SUCCESS].any()) if SUCCESS in rows else None
            rewards = np.unique(rows[REWARD]).astype(np.float32) if REWARD in rows else None
            return _Checked(row, first, self._known_tasks(rows[TASK_INDEX]), success, rewards, sizes)

    def _known_tasks(self, task_index: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return frame and task_index wherever the task changes."""
        indices = task_index.ravel()
        frames = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist()]
        tasks = indices[frames].tolist()
        unknown = [task for task in tasks if task not in self.meta.tasks]
        if unknown:
            raise DataError(
                f"task_index: {unknown[0]} is not in {self.meta.tasks_path}, which has a text for "
                f"{', '.join(map(str, list(self.meta.tasks)[:10]))}. Add it there."
            )
        return tuple(zip(frames, tasks, strict=True))

    def _picture_sizes(self, row: EpisodeRow, first: int) -> dict[str, tuple[int, int]]:
        """Return picture sizes by feature, from the first image's header; for videos only if they are opened anyway."""
        sizes = {}
        for key in self._camera_keys.values():
            if key in row.videos:
                path = row.videos[key].path
                if not path.is_file():
                    raise _bad(row, path, "no such video file", key)
                if self._opens_videos:
                    sizes[key] = self._outline(row, key).size
            elif key not in self._parquet.names(row.file):
                raise _bad(row, row.file, "the column of this camera is missing, though info.json lists it", key)
            else:
                with _blaming(row, row.file, key):
                    sizes[key] = checks.image_size(self._parquet.cell(row.file, key, first))
        return sizes

    def _outline(self, row: EpisodeRow, key: str) -> video.Outline:
        path = row.videos[key].path
        with _blaming(row, path, key):
            if path not in self._outlines:
                self._outlines[path] = video.outline(path)
            return self._outlines[path]

    def check_videos(self) -> None:
        """Raise at the first episode whose videos do not hold the frames in the tables, or have another size.

        Only headers are read. Opening reads no videos unless episodes may be skipped, because numbers and statistics
        need none. With a frame cache sizes may differ, because it resizes all frames.
        """
        if self._opens_videos or not self._video_keys:
            return

        def find_out() -> Arrays:
            sizes = {
                index: {key: self._outline(facts.row, key).size for key in self._video_keys}
                for index, facts in enumerate(self._facts)
            }
            self._check_frame_counts()
            usual = usual_features(sizes.values())
            for index in sizes if self._frame_cache is None else ():
                check_alike(sizes, index, usual, lambda at: _where(self._facts[at].row), checks.told_size)
            return {"are_alike": np.array(True)}

        asked = ("videos", self._camera_keys, self.numbers, self._tolerance_s, self._frame_cache is None)
        if self._metadata_cache is None:
            find_out()
        else:
            self._metadata_cache.get(self.meta.root, asked, find_out)

    def _check_frame_counts(self) -> None:
        for key in self._video_keys:
            faults = lerobot_stretches.video_faults(self.meta, key, self._tolerance_s, self._sizes_known)
            for number in self.numbers:
                if number in faults:
                    raise ValueError(faults[number])

    def _check_total_frames(self) -> None:
        """Compare total_frames with the episode table; if they differ, the files themselves decide."""
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
        except DataError:
            return otherwise


def download(repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Copy a dataset from the Hugging Face hub into ``folder``; files that are there already are not copied again.

    Raises:
        ConnectionError: there is no network, no such dataset, or no access to it.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("downloading datasets needs huggingface-hub: pip install 'acrlpd[remote]'") from error
    name = repo_id.removeprefix("hf://").removeprefix("datasets/")
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_dir=Path(folder)))
    except OSError as error:  # the library's own errors are among them
        raise ConnectionError(
            f"could not copy the dataset {name} to {folder}: {error}. Check its name, the network and your access, or "
            "copy it there by hand."
        ) from error


def hub_folder(repo_id: str) -> Path:
    """Return the folder for a dataset of the hub, below the user's cache directory (XDG_CACHE_HOME)."""
    name = repo_id.removeprefix("hf://").removeprefix("datasets/")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acrlpd" / "lerobot"
    return inside(cache, name, "the name of a dataset")


def _opened(root: Any, episodes: Sequence[int] | None) -> tuple[Path, Sequence[int] | None]:
    """Return folder and selection from a path or a LeRobotDataset, which is recognized by its attributes."""
    if isinstance(root, (str, os.PathLike)):
        return dataset_folder(root), episodes
    if hasattr(root, "repo_ids"):
        raise TypeError(f"{type(root).__name__} holds several datasets: open them one by one, each by its folder")
    folder = getattr(getattr(root, "meta", None), "root", None)
    if folder is None:
        raise TypeError(f"expected a folder or a LeRobotDataset, got {type(root).__name__} without meta.root")
    return dataset_folder(folder), getattr(root, "episodes", None) if episodes is None else episodes


def dataset_folder(root: str | os.PathLike[str]) -> Path:
    """Return the folder if it exists; otherwise the error says how to copy a dataset from the hub."""
    folder = Path(root)
    if folder.is_dir():
        return folder
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
    numbers = np.asarray(episodes).ravel().tolist()
    known = all(isinstance(number, int) and 0 <= number < len(meta.episodes) for number in numbers)
    if not known or len(set(numbers)) < len(numbers) or not numbers:
        last = len(meta.episodes) - 1
        raise ValueError(f"{meta.root}: episodes must be different numbers in 0..{last}, got {numbers}")
    return [meta.episodes[number] for number in numbers]


def _name(row: EpisodeRow) -> str:
    return f"episode_{row.number:06d}"


def _where(row: EpisodeRow) -> str:
    return f"{row.file}: episode {row.number}"


def _bad(row: EpisodeRow, file: Path, text: str, key: str | None = None) -> ValueError:
    return ValueError(f"{file}: episode {row.number}: {'' if key is None else key + ': '}{text}")


@contextlib.contextmanager
def _blaming(row: EpisodeRow, file: Path, key: str | None = None) -> Iterator[None]:
    """Add file, episode and key to errors that only say what is wrong."""
    try:
        yield
    except (DataError, video.VideoError) as error:
        raise _bad(row, file, str(error), key) from error


def _reward_values(found: Iterable[_Checked]) -> list[np.ndarray]:
    return [facts.reward_values for facts in found if facts.reward_values is not None]
