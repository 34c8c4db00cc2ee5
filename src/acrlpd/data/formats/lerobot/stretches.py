"""Checks that the tables of a LeRobot dataset assign every video frame, and every row, to one episode."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from acrlpd.data.formats.lerobot.meta import Meta, is_v3
from acrlpd.data.formats.lerobot.partition import Files, Partition, Stretch
from acrlpd.files import listed

REMEDY = (
    "The episode table in meta does not fit the files: repair it, make the data set anew from what it was merged or "
    "converted from, or leave such episodes out (on_bad_episode 'skip')."
)
MAX_TOLERANCE = 0.5  # frames; a larger tolerance would reach the next frame


def row_faults(meta: Meta, checked: Collection[int]) -> dict[int, str]:
    """Return what is wrong with the ranges of global indices (v3), by episode.

    ``checked`` are the episodes whose rows agree with their range; others are not considered.
    """
    ranges = [
        Stretch(row.number, *row.indices, row.length)
        for row in meta.episodes
        if row.indices is not None and row.number in checked
    ]
    rule = Partition(0, lambda place: f"index {place:.0f}")
    faults = rule.faults({meta.root: ranges}, {}, holes=len(ranges) == len(meta.episodes))
    columns = "dataset_from_index, dataset_to_index"
    return {
        number: f"{meta.episodes[number].file}: episode {number}: {columns}: {text}. {REMEDY}"
        for number, text in faults.items()
    }


def video_faults(
    meta: Meta,
    key: str,
    tolerance_s: float,
    sizes: Mapping[Path, int],
    size_of: Callable[[Path], int | None] | None = None,
) -> dict[int, str]:
    """Return what is wrong with the stretches of one camera's files, by episode; ``sizes``: frames of files, if known.

    With ``size_of``, which reads the size of any file, the result has only the misplaced episodes if the sizes show
    which ones these are. Without it, the result has the episodes at which the fault shows.

    Raises:
        ValueError: a file belongs to no episode, and there is no faulty episode to which it could belong.
    """
    files = _stretches(meta, key)
    tolerance = min(tolerance_s * meta.fps, MAX_TOLERANCE)
    rule = Partition(tolerance, lambda frames: f"{frames / meta.fps:.6g} s")
    faults = rule.faults(files, sizes)
    unused = _unused(meta, key, files) if is_v3(meta.version) else []
    names = listed(path.relative_to(meta.root) for path in unused)
    if unused and not faults:
        raise ValueError(
            f"{unused[0]}: {key}: no episode of the table has its frames ({len(unused)} such files: {names}). Repair "
            "meta/episodes, or move the files away if they are left over."
        )
    if faults and size_of is not None:
        known = {path: size_of(path) for path in sorted([*files, *unused], key=_numbers)}
        faults = rule.misplaced(files, {path: size for path, size in known.items() if size is not None})
    columns = f"{key}: from_timestamp, to_timestamp" if is_v3(meta.version) else key
    unused_too = f" No episode has frames of {names}." if unused else ""
    return {
        number: f"{meta.episodes[number].videos[key].path}: episode {number}: {columns}: {text}.{unused_too} {REMEDY}"
        for number, text in faults.items()
    }


def unusual_order(meta: Meta, key: str) -> str | None:
    """Return a warning if a camera's files do not hold the episodes in the order of their numbers, else None."""
    files = _stretches(meta, key)
    placed = [
        (each.episode, path)
        for path in sorted(files, key=_numbers)
        for each in sorted(files[path], key=lambda each: (each.start, each.stop))
    ]
    for (before, _), (number, path) in itertools.pairwise(placed):
        if number < before:
            return (
                f"{path}: episode {number}: {key}: it lies behind episode {before}. Writers put them in the order of "
                "their numbers: see whether the table has mixed them up."
            )
    return None


def _stretches(meta: Meta, key: str) -> Files:
    """Return the stretches of each file of a camera; in v2 every file holds one episode."""
    files: dict[Path, list[Stretch]] = {}
    for row in meta.episodes:
        span = row.videos[key]
        start = span.start_s * meta.fps
        stop = start + row.length if math.isinf(span.stop_s) else span.stop_s * meta.fps
        files.setdefault(span.path, []).append(Stretch(row.number, start, stop, row.length))
    return files


def _unused(meta: Meta, key: str, used: Files) -> list[Path]:
    """Return the video files of a camera that match the template, and that no episode uses."""
    anything = re.sub(r"\{(chunk_index|file_index)[^{}]*\}", "*", meta.video_path or "")
    pattern = anything.replace("{video_key}", re.sub(r"([*?[])", r"[\1]", key))
    return sorted((path for path in meta.root.glob(pattern) if path not in used), key=_numbers)


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file's path as a sort key, because numbers above 999 have more digits."""
    return [int(digits) for digits in re.findall(r"\d+", str(path))]
