"""What opening a LeRobot dataset finds out: which episodes are whole, the size of pictures, success and all numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float

from acrlpd.data.formats import video
from acrlpd.data.formats.lerobot import checks, stretches
from acrlpd.data.formats.lerobot.files import EpisodeFacts, LeRobotFiles, blaming, fault
from acrlpd.data.formats.lerobot.meta import REWARD, SUCCESS, TASK_INDEX, TERMINAL, EpisodeRow, Meta
from acrlpd.data.formats.parquet import DataError
from acrlpd.data.formats.pictures import PictureError
from acrlpd.data.formats.rewards import Labeller, RewardConfig
from acrlpd.data.store import flat
from acrlpd.data.store.episodes import KNOWN_SUCCESS, NUMBERS, BadEpisodes, OptionError, check_alike, usual_features
from acrlpd.data.store.metadata_cache import Arrays, pack, unpack

FULL_CHECK_BLOCK = 64  # frames
LOOKED_AT = 3  # episodes to try when checking what kind of pictures a camera has
READERS = 8  # threads that read parquet files


@dataclasses.dataclass(frozen=True)
class _Checked:
    """The result of reading and checking an episode's numbers. Its success is the recorded one."""

    facts: EpisodeFacts
    reward_values: Float[np.ndarray, " n"] | None  # the different values of next.reward
    sizes: dict[str, tuple[int, int]]  # height and width of the pictures, by feature


class Opening:
    """The checks of a dataset's episodes.

    Args:
        joined: the columns that make up ``state`` and ``actions``.
        cameras: the features with pictures, by the camera's name.
        bad: what happens to an episode that cannot be used.
        check_images: decode every picture. Otherwise, if bad episodes are left out, check that the frames are there.
        are_chosen: the user named the cameras, so one that holds no colour is an error.
        folder: where numbers that are too large for memory are kept; see ``flat.FlatRows``.
    """

    def __init__(
        self,
        files: LeRobotFiles,
        joined: Mapping[str, Sequence[str]],
        cameras: dict[str, str],
        rewards: RewardConfig | None,
        bad: BadEpisodes,
        *,
        check_images: bool,
        are_chosen: bool,
        folder: Path | None,
    ):
        self._files, self._meta = files, files.meta
        self._joined = joined
        self._cameras = cameras
        self._rewards = rewards
        self._bad = bad
        self._are_chosen = are_chosen
        self._check_images = check_images
        self._folder = folder

    @property
    def opens_videos(self) -> bool:
        return self._check_images or self._bad.skip

    def find_out(self, rows: Sequence[EpisodeRow]) -> Arrays:
        """Check the episodes and return everything to be remembered about the usable ones."""
        unread = self._not_colour(rows)
        self._cameras = {name: key for name, key in self._cameras.items() if name not in unread}
        found = self._readable(rows)
        found = self._without(found, self._misplaced(found))
        found = self._without(found, self._of_other_sizes(found))
        if self._check_images:
            found = self._without(found, self._faulty_pictures(found, functools.partial(decode_all, self._files)))
        elif self._bad.skip:
            found = self._without(found, self._faulty_pictures(found, functools.partial(self._look_for_frames, {})))
        check_total_frames(self._files)
        return self._labelled(found, unread, len(rows))

    def _without(self, found: Sequence[_Checked], faults: Mapping[int, Exception]) -> list[_Checked]:
        """Return the episodes that have none of these faults, which are given by episode number."""
        good = []
        for checked in found:
            with self._bad.guard(name_of(checked.facts.row)):
                if checked.facts.row.number in faults:
                    raise faults[checked.facts.row.number]
                good.append(checked)
        return good

    def _labelled(self, found: Sequence[_Checked], unread: dict[str, str], total: int) -> Arrays:
        """Label the episodes; leave out those whose outcome, or the meaning of whose rewards, is unknown."""
        values = [checked.reward_values for checked in found if checked.reward_values is not None]
        labeller = Labeller.of(self._rewards, values)
        has_terminals = TERMINAL in self._files.columns
        usable: list[EpisodeFacts] = []
        numbers = {key: flat.FlatRows(key, self._folder) for key in NUMBERS}
        for checked in found:
            labels = None
            with self._bad.guard(name_of(checked.facts.row)):
                rewards = checked.reward_values if labeller.are_known else None
                success = labeller.success(checked.facts.success, rewards, has_terminals=has_terminals)
                facts = dataclasses.replace(checked.facts, success=success)
                labels = self._files.label(facts, labeller)
            if labels is not None:
                usable.append(facts)
                own = {key: self._files.joined(facts, keys) for key, keys in self._joined.items()}
                for key, rows in (own | dict(zip(("rewards", "terminals"), labels, strict=True))).items():
                    numbers[key].append(rows, name_of(facts.row))
        self._bad.report(str(self._meta.root), total)
        changes = [(facts.row.number, facts.tasks[1:]) for facts in usable if len(facts.tasks) > 1]
        return {
            "facts": pack(
                {"skipped": self._bad.skipped, "sizes": self._files.sizes, "task_changes": changes, "unread": unread}
            ),
            "numbers": np.array([facts.row.number for facts in usable]),
            "firsts": np.array([facts.first for facts in usable]),
            "tasks": np.array([facts.tasks[0][1] for facts in usable]),
            "successes": np.array([KNOWN_SUCCESS.index(facts.success) for facts in usable], np.int8),
            **{key: column.result() for key, column in numbers.items()},
        }

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _readable(self, rows: Sequence[EpisodeRow]) -> list[_Checked]:
        """Return the episodes whose numbers are good."""
        good = []
        with contextlib.closing(self._outcomes(rows)) as outcomes:
            for row, outcome in zip(rows, outcomes, strict=True):
                with self._bad.guard(name_of(row)):
                    if isinstance(outcome, Exception):
                        raise outcome
                    good.append(outcome)
        return good

    def _outcomes(self, rows: Sequence[EpisodeRow]) -> Generator[_Checked | Exception, None, None]:
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
            raise fault(
                row, row.file, "the episode is empty: its length in the episode table is 0, expected at least 1"
            )
        with blaming(row, row.file):
            table = self._files.parquet.columns(row.file, self._files.columns)
            first = checks.first_row(row, table)
            rows = {key: values[first : first + row.length] for key, values in table.items()}
            for key, values in rows.items():
                checks.check_values(key, values, self._meta.features)
            checks.check_clock(rows, self._meta.fps, self._files.tolerance_s)
            if video_keys(self._meta, self._cameras.values()):
                checks.check_start(rows, self._files.tolerance_s)
            sizes = self._picture_sizes(row, first)
            success = bool(rows[SUCCESS].any()) if SUCCESS in rows else None
            rewards = np.unique(rows[REWARD]).astype(np.float32) if REWARD in rows else None
            return _Checked(EpisodeFacts(row, first, self._tasks(rows[TASK_INDEX]), success), rewards, sizes)

    def _tasks(self, task_index: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return frame and task_index wherever the task changes."""
        indices = task_index.ravel()
        frames = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist()]
        tasks = indices[frames].tolist()
        unknown = [task for task in tasks if task not in self._meta.tasks]
        if unknown:
            raise DataError(
                f"task_index: {unknown[0]} is not in {self._meta.tasks_path}, which has a text for "
                f"{', '.join(map(str, list(self._meta.tasks)[:10]))}. Add it there."
            )
        return tuple(zip(frames, tasks, strict=True))

    def _picture_sizes(self, row: EpisodeRow, first: int) -> dict[str, tuple[int, int]]:
        """Return picture sizes by feature, from the first image's header; for videos only if they are opened anyway."""
        sizes = {}
        for key in self._cameras.values():
            if key in row.videos:
                path = row.videos[key].path
                if not path.is_file():
                    raise fault(row, path, "no such video file", key)
                if self.opens_videos:
                    sizes[key] = self._files.outline(row, key).size
            elif key not in self._files.parquet.names(row.file):
                raise fault(row, row.file, "the column of this camera is missing, though info.json lists it", key)
            else:
                with blaming(row, row.file, key):
                    sizes[key] = checks.image_size(self._files.parquet.cell(row.file, key, first))
        return sizes

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _not_colour(self, rows: Sequence[EpisodeRow]) -> dict[str, str]:
        """Return the reason for each camera whose first picture, or video header, is not 8-bit colour.

        Raises:
            OptionError: the user asked for such a camera.
        """
        reasons = {}
        for name, key in self._cameras.items():
            try:
                self._look_at_first(rows, key)
            except PictureError as error:
                if self._are_chosen:
                    raise OptionError(f"{self._meta.root}: {key}: {error}. Leave it out of cameras.") from error
                reasons[name] = str(error)
        return reasons

    def _look_at_first(self, rows: Sequence[EpisodeRow], key: str) -> None:
        """Raise ``PictureError`` if the first readable picture is not 8-bit colour."""
        for row in rows[:LOOKED_AT]:
            try:
                if key in row.videos:
                    video.check_colour(row.videos[key].path)
                else:
                    checks.check_colour(self._files.parquet.cell(row.file, key, 0))
                return
            except PictureError:
                raise
            except (DataError, video.VideoError, ImportError):  # reported when the episode or the picture is read
                continue

    def _misplaced(self, found: Sequence[_Checked]) -> dict[int, Exception]:
        """Find the episodes that share rows or frames with others, by tables and by headers read so far."""
        faults = stretches.row_faults(self._meta, {checked.facts.row.number for checked in found})
        for key in video_keys(self._meta, self._cameras.values()):
            size_of = _num_frames if self._bad.skip else None
            of_camera = stretches.video_faults(
                self._meta, key, self._files.tolerance_s, self._files.num_frames, size_of
            )
            if not of_camera and (text := stretches.unusual_order(self._meta, key)) is not None:
                warnings.warn(text, stacklevel=4)
            faults = of_camera | faults
        return {number: ValueError(text) for number, text in faults.items()}

    def _of_other_sizes(self, found: Sequence[_Checked]) -> dict[int, Exception]:
        """Find the episodes whose pictures do not have the most common size, and keep that size."""
        by_number = {checked.facts.row.number: checked for checked in found}
        sizes = {number: checked.sizes for number, checked in by_number.items()}
        self._files.sizes = usual_features(sizes.values())
        faults: dict[int, Exception] = {}
        for number in by_number:
            try:
                check_alike(sizes, number, self._files.sizes, lambda at: by_number[at].facts.where, checks.told_size)
            except ValueError as error:
                faults[number] = error
        return faults

    def _faulty_pictures(
        self, found: Sequence[_Checked], check: Callable[[EpisodeFacts, str], None]
    ) -> dict[int, Exception]:
        """Find the episodes whose pictures fail ``check``. Several files are read at once, each front to back."""
        by_file: dict[tuple[str, Path], list[EpisodeFacts]] = {}
        for checked in found:
            for key in self._cameras.values():
                span = checked.facts.row.videos.get(key)
                file = checked.facts.row.file if span is None else span.path
                by_file.setdefault((key, file), []).append(checked.facts)

        def faults_of(key: str, episodes: Sequence[EpisodeFacts]) -> dict[int, Exception]:
            faults: dict[int, Exception] = {}
            for facts in episodes:
                try:
                    check(facts, key)
                except (ValueError, OSError) as error:
                    faults[facts.row.number] = error
            return faults

        faults: dict[int, Exception] = {}
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, video.MAX_OPEN_FILES))
        try:
            for some in pool.map(faults_of, (key for key, _ in by_file), by_file.values()):
                faults = some | faults
        finally:
            pool.shutdown(cancel_futures=True)
        return faults

    def _look_for_frames(self, times_s: dict[Path, np.ndarray], facts: EpisodeFacts, key: str) -> None:
        """Check without decoding that all frames of an episode are there; ``times_s`` caches each mp4's frame times."""
        row, files = facts.row, self._files
        if key in row.videos:
            span = row.videos[key]
            with blaming(row, span.path, key):
                if span.path not in times_s:
                    times_s[span.path] = video.frame_times(span.path)
                wanted, limits = files.frame_times(facts, key), (span.start_s, span.stop_s)
                video.check_times(times_s[span.path], wanted, files.tolerance_s, limits)
        else:
            with blaming(row, row.file, key):
                cells = files.parquet.cells(row.file, key, facts.first, facts.first + row.length)
                for frame, cell in enumerate(cells):
                    checks.check_image(cell, frame, files.sizes[key])


def episodes_of(opened: Arrays, meta: Meta) -> list[EpisodeFacts]:
    """Return the facts about the usable episodes from what ``Opening.find_out`` returned."""
    changes = {number: tuple(map(tuple, each)) for number, each in unpack(opened["facts"])["task_changes"]}
    known = zip(*(opened[key].tolist() for key in ("numbers", "firsts", "tasks", "successes")), strict=True)
    return [
        EpisodeFacts(meta.episodes[at], first, ((0, task), *changes.get(at, ())), KNOWN_SUCCESS[success])
        for at, first, task, success in known
    ]


def decode_all(files: LeRobotFiles, facts: EpisodeFacts, key: str) -> None:
    """Decode every frame of a camera; raise at the first that is missing, misplaced or damaged."""
    for start in range(0, facts.row.length, FULL_CHECK_BLOCK):
        files.frames(facts, key, start, min(start + FULL_CHECK_BLOCK, facts.row.length))


def check_videos(
    files: LeRobotFiles, episodes: Sequence[EpisodeFacts], cameras: Iterable[str], *, any_size: bool
) -> None:
    """Raise at the first episode whose videos do not hold the frames in the tables, or have another size.

    Only headers are read.
    """
    keys = video_keys(files.meta, cameras)
    sizes = {at: {key: files.outline(facts.row, key).size for key in keys} for at, facts in enumerate(episodes)}
    for key in keys:
        faults = stretches.video_faults(files.meta, key, files.tolerance_s, files.num_frames)
        for facts in episodes:
            if facts.row.number in faults:
                raise ValueError(faults[facts.row.number])
    usual = usual_features(sizes.values())
    for at in () if any_size else sizes:
        check_alike(sizes, at, usual, lambda other: episodes[other].where, checks.told_size)


def check_total_frames(files: LeRobotFiles) -> None:
    """Compare total_frames with the episode table; if they differ, the files themselves decide."""
    by_file: dict[Path, int] = {}
    for row in files.meta.episodes:
        by_file[row.file] = by_file.get(row.file, 0) + row.length

    def num_rows(path: Path) -> int:
        try:
            return files.parquet.num_rows(path)
        except DataError:
            return by_file[path]

    in_table, total = sum(by_file.values()), files.meta.total_frames
    if in_table != total and sum(map(num_rows, by_file)) != total:
        raise ValueError(
            f"{files.meta.info_path}: total_frames is {total}, but the episode table adds up to {in_table} frames. "
            "One of the two files is out of date."
        )


def video_keys(meta: Meta, keys: Iterable[str]) -> list[str]:
    """Return the features that are stored as videos."""
    return [key for key in keys if meta.features[key]["dtype"] == "video"]


def name_of(row: EpisodeRow) -> str:
    return f"episode_{row.number:06d}"


def _num_frames(path: Path) -> int | None:
    """Read the number of frames of a video; None if it does not open, which its episodes report."""
    try:
        return video.outline(path).num_frames
    except video.VideoError:
        return None
