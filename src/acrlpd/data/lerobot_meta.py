"""The tables of a LeRobot dataset, v2.0, v2.1 or v3.0, brought to one form: which rows and frames are an episode's.

    v2   meta/tasks.jsonl    meta/episodes.jsonl                    a parquet file and, per camera, an mp4 an episode
    v3   meta/tasks.parquet  meta/episodes/chunk-*/file-*.parquet   many episodes share a file, each kind on its own

Errors found here concern the set as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acrlpd.data.episodes import OptionError
from acrlpd.data.parquet import import_pyarrow

PICTURES = ("image", "video")  # dtypes of cameras
DEFAULT_CHUNKS_SIZE = 1000
TIMESTAMP, INDEX, TASK_INDEX = "timestamp", "index", "task_index"
REQUIRED = (TIMESTAMP, "frame_index", "episode_index", INDEX, TASK_INDEX)  # columns of every dataset
STATE_KEYS = (("observation.state",), ("state",), ("joint_position", "gripper_position"))  # the first that are there
ACTION_KEYS = ("action", "actions")
CAMERA_PREFIXES = ("observation.images.", "observation.")  # left out of a camera's name


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where an episode's frames lie in an mp4: ``start_s + timestamp``, before ``stop_s``."""

    path: Path
    start_s: float = 0.0
    stop_s: float = np.inf


@dataclasses.dataclass(frozen=True)
class EpisodeRow:
    """An episode as the tables have it."""

    number: int
    length: int
    file: Path  # the parquet file with its rows
    indices: tuple[int, int] | None  # its half-open range of global indices (v3); None: all rows of the file (v2)
    videos: dict[str, VideoSpan]  # by feature


@dataclasses.dataclass(frozen=True)
class Meta:
    root: Path
    version: str
    fps: float
    total_frames: int
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episodes: list[EpisodeRow]  # episode n is at place n

    @property
    def info_path(self) -> Path:
        return self.root / "meta/info.json"

    @property
    def tasks_path(self) -> Path:
        return self.root / ("meta/tasks.parquet" if is_v3(self.version) else "meta/tasks.jsonl")

    def numeric(self, key: str) -> bool:
        return self.features[key]["dtype"] not in (*PICTURES, "string")

    @property
    def cameras(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] in PICTURES]


def read(root: Path) -> Meta:
    """The tables, checked against one another.

    Raises:
        ValueError: the version is unknown, a table cannot be read, or totals and numbers do not agree.
    """
    path = root / "meta/info.json"
    info = _read_json(path)
    version = _version(path, info)
    _check_info(path, info)
    tasks = (_tasks_v3 if is_v3(version) else _tasks_v2)(root)
    episodes = (_episodes_v3 if is_v3(version) else _episodes_v2)(root, info)
    _check_total(path, "total_episodes", info["total_episodes"], len(episodes), "episodes are in the episode table")
    _check_total(path, "total_tasks", info.get("total_tasks", len(tasks)), len(tasks), "tasks are in the task table")
    _check_numbers(episodes, "episodes.jsonl" if not is_v3(version) else "meta/episodes", root)
    episodes.sort(key=lambda row: row.number)
    return Meta(root, version, float(info["fps"]), int(info["total_frames"]), info["features"], tasks, episodes)


def is_v3(version: str) -> bool:
    return version.startswith("v3")


def files_by_number(folder: Path) -> list[Path]:
    """``chunk-*/file-*.parquet`` in the order of their numbers, which grow wider past 999."""

    def numbers(path: Path) -> tuple[int, int]:
        return int(path.parent.name.removeprefix("chunk-")), int(path.stem.removeprefix("file-"))

    return sorted(folder.glob("chunk-*/file-*.parquet"), key=numbers)


def state_keys(meta: Meta, asked: Sequence[str] | None) -> tuple[str, ...]:
    usual = [keys for keys in STATE_KEYS if all(key in meta.features for key in keys)]
    keys = usual[0] if asked is None and usual else tuple(asked or ())
    return _numeric(meta, "state_keys", keys)


def action_keys(meta: Meta, asked: Sequence[str] | None) -> tuple[str, ...]:
    usual = [key for key in ACTION_KEYS if key in meta.features]
    return _numeric(meta, "action_keys", usual[:1] if asked is None else asked)


def _numeric(meta: Meta, name: str, keys: Sequence[str]) -> tuple[str, ...]:
    there = [key for key in meta.features if meta.numeric(key) and key not in REQUIRED]
    unknown = [key for key in keys if key not in there]
    if unknown or not keys:
        wrong = f"{unknown} are not among them" if unknown else "none has a usual name"
        raise OptionError(
            f"{meta.info_path}: {name}: the numeric features are {', '.join(there)}; {wrong}. Name {name}."
        )
    return tuple(keys)


def camera_keys(meta: Meta, asked: Sequence[str] | None) -> dict[str, str]:
    """Feature by the camera's name: without prefix, unless two cameras would then have the same name."""
    short = {key: _camera_name(key) for key in meta.cameras}
    names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    keys = {name: key for key, name in names.items()}
    unknown = [name for name in asked or () if name not in keys]
    if unknown:
        raise OptionError(f"{meta.info_path}: no camera {', '.join(unknown)}; the cameras are {', '.join(keys)}")
    return keys if asked is None else {name: keys[name] for name in asked}


def _camera_name(key: str) -> str:
    for prefix in CAMERA_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _version(path: Path, info: Mapping[str, Any]) -> str:
    version = str(info.get("codebase_version", "missing"))
    if not re.fullmatch(r"v[23](\.\d+)*", version):
        raise ValueError(
            f"{path}: codebase_version is {version}, and only v2.0, v2.1 and v3.0 are known. "
            "Convert the dataset with LeRobot's own scripts."
        )
    return version


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    needed = ("fps", "features", "total_episodes", "total_frames", "data_path")
    missing = [key for key in needed if key not in info]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; it is not the info.json of a LeRobot dataset")
    if not info["fps"] > 0:
        raise ValueError(f"{path}: fps must be above 0, got {info['fps']}")
    has_videos = any(feature["dtype"] == "video" for feature in info["features"].values())
    if has_videos and not info.get("video_path"):
        raise ValueError(f"{path}: video_path is missing, though some features are stored as video")


def _check_total(path: Path, key: str, expected: int, found: int, what: str) -> None:
    if expected != found:
        raise ValueError(f"{path}: {key} is {expected}, but {found} {what}. One of the two files is out of date.")


def _check_numbers(episodes: Sequence[EpisodeRow], table: str, root: Path) -> None:
    numbers, counts = np.unique([row.number for row in episodes], return_counts=True)
    if (counts > 1).any():
        twice = numbers[counts > 1].tolist()
        raise ValueError(f"{root / 'meta'}: {table}: duplicate episode_index: {twice} occur more than once")
    if len(numbers) == 0:
        raise ValueError(f"{root / 'meta'}: {table}: the dataset has no episodes")
    if numbers[0] != 0 or numbers[-1] != len(numbers) - 1:
        holes = np.setdiff1d(np.arange(len(numbers)), numbers).tolist()
        raise ValueError(f"{root / 'meta'}: {table}: episode_index must run from 0 without holes; {holes} are missing")


def _tasks_v2(root: Path) -> dict[int, str]:
    lines = _read_lines(root / "meta/tasks.jsonl", "task_index", "task")
    return {int(line["task_index"]): line["task"] for line in lines}


def _episodes_v2(root: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    rows = []
    for line in _read_lines(root / "meta/episodes.jsonl", "episode_index", "length"):
        number = int(line["episode_index"])
        place = {"episode_chunk": number // int(info.get("chunks_size", DEFAULT_CHUNKS_SIZE)), "episode_index": number}
        videos = {key: VideoSpan(root / info["video_path"].format(**place, video_key=key)) for key in cameras}
        file = root / info["data_path"].format(**place)
        rows.append(EpisodeRow(number, int(line["length"]), file, None, videos))
    return rows


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.parquet"
    table = _read_table(path)
    texts = [name for name in table if name != "task_index"]
    if "task_index" not in table or len(texts) != 1:
        raise ValueError(f"{path}: expected task_index and one column of texts, found {', '.join(table)}")
    return dict(zip(table["task_index"], table[texts[0]], strict=True))


def _episodes_v3(root: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    files = files_by_number(root / "meta/episodes")
    if not files:
        raise ValueError(f"{root / 'meta/episodes'}: expected chunk-*/file-*.parquet, found none")
    return [row for file in files for row in _episodes_of(file, root, info, cameras)]


def _episodes_of(file: Path, root: Path, info: Mapping[str, Any], cameras: Sequence[str]) -> list[EpisodeRow]:
    table = _read_table(file)
    needed = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    needed += ["data/chunk_index", "data/file_index"]
    fields = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    needed += [f"videos/{key}/{field}" for key in cameras for field in fields]
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(f"{file}: column {missing[0]!r} is missing; the table has {', '.join(table)}")

    @functools.cache  # ten thousand episodes lie in few files, and a path takes longer than the rest of a row
    def path_of(kind: str, chunk: int, number: int, key: str = "") -> Path:
        return root / info[kind].format(chunk_index=chunk, file_index=number, video_key=key)

    def span(at: int, key: str) -> VideoSpan:
        chunk, number, start, stop = (table[f"videos/{key}/{field}"][at] for field in fields)
        return VideoSpan(path_of("video_path", chunk, number, key), start, stop)

    def row(at: int) -> EpisodeRow:
        path = path_of("data_path", table["data/chunk_index"][at], table["data/file_index"][at])
        indices = (table["dataset_from_index"][at], table["dataset_to_index"][at])
        videos = {key: span(at, key) for key in cameras}
        return EpisodeRow(table["episode_index"][at], table["length"][at], path, indices, videos)

    return [row(at) for at in range(len(table["episode_index"]))]


def _read_table(path: Path) -> dict[str, list[Any]]:
    """All columns by name but the per-episode statistics, which are big."""
    arrow = import_pyarrow()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the dataset is incomplete")
    try:
        file = arrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        table = file.read(names)
        return {name: table[name].to_pylist() for name in names}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected texts in UTF-8, found invalid bytes ({error})") from error
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a complete parquet file ({error})") from error


def _read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        line = _parsed(f"{path}, line {number}", text)
        missing = [key for key in keys if key not in line]
        if missing:
            raise ValueError(f"{path}, line {number}: {', '.join(missing)} missing; it has {', '.join(line)}")
        lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(str(path), _read_text(path))


def _parsed(where: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected complete JSON, found {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; the dataset is incomplete") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, found a byte that is none ({error}). Save it as UTF-8.") from error
