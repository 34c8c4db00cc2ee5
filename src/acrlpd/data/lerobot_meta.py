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
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
class _Kind:
    """What a value of a table must be."""

    told: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value) and abs(value) < 2**62


COUNT = _Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
SIZE = _Kind("a whole number from 1", lambda value: _is_whole(value) and value >= 1)
SECONDS = _Kind("a number of seconds", _is_number)
RATE = _Kind("a number above 0", lambda value: _is_number(value) and value > 0)
TEXT = _Kind("text", lambda value: isinstance(value, str))
OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
SHAPE = _Kind("a list of whole numbers", lambda value: isinstance(value, list) and all(map(COUNT.holds, value)))


def _check(where: str, content: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> None:
    """Raises unless ``content`` has all of these keys, each with a value of its kind."""
    for key, kind in kinds.items():
        if key not in content:
            raise ValueError(f"{where}: {key} is missing, expected {kind.told}; it has {', '.join(content)}")
        if not kind.holds(content[key]):
            raise ValueError(f"{where}: {key}: expected {kind.told}, found {reprlib.repr(content[key])}")


def _check_rows(path: Path, table: Mapping[str, Sequence[Any]], kinds: Mapping[str, _Kind]) -> None:
    for key, kind in kinds.items():
        if key not in table:
            raise ValueError(f"{path}: column {key!r} is missing; the table has {', '.join(table)}")
        wrong = next((at for at, value in enumerate(table[key]) if not kind.holds(value)), None)
        if wrong is not None:
            found = reprlib.repr(table[key][wrong])
            raise ValueError(f"{path}, row {wrong}: {key}: expected {kind.told}, found {found}")


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
    robot_type: str | None = None  # None: it does not say

    @property
    def info_path(self) -> Path:
        return self.root / "meta/info.json"

    @property
    def tasks_path(self) -> Path:
        return self.root / ("meta/tasks.parquet" if is_v3(self.version) else "meta/tasks.jsonl")

    def numeric(self, key: str) -> bool:
        return is_numeric(self.features[key]["dtype"])

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
    robot = info.get("robot_type")
    robot = None if robot in ("", "unknown") or not isinstance(robot, str) else robot
    numbers = float(info["fps"]), int(info["total_frames"])
    return Meta(root, version, *numbers, info["features"], tasks, episodes, robot)


def is_numeric(dtype: str) -> bool:
    """Whether a feature of this dtype holds numbers or flags."""
    try:
        return np.dtype(dtype).kind in "biuf"
    except (TypeError, ValueError):
        return False


def is_v3(version: str) -> bool:
    return version.startswith("v3")


def files_by_number(folder: Path) -> list[Path]:
    """``chunk-*/file-*.parquet`` in the order of their numbers, which grow wider past 999."""

    def numbers(path: Path) -> tuple[int, int]:
        chunk, file = path.parent.name.removeprefix("chunk-"), path.stem.removeprefix("file-")
        if not chunk.isdecimal() or not file.isdecimal():
            raise ValueError(f"{path}: expected a name like chunk-000/file-000.parquet. Is it a copy? Move it away.")
        return int(chunk), int(file)

    return sorted(folder.glob("chunk-*/file-*.parquet"), key=numbers)


def state_keys(meta: Meta, asked: Sequence[str] | None) -> tuple[str, ...]:
    usual = [keys for keys in STATE_KEYS if all(key in meta.features for key in keys)]
    keys = usual[0] if asked is None and usual else tuple(asked or ())
    return _numeric(meta, "state_keys", keys, ValueError if asked is None else OptionError)


def action_keys(meta: Meta, asked: Sequence[str] | None) -> tuple[str, ...]:
    usual = [key for key in ACTION_KEYS if key in meta.features]
    keys = usual[:1] if asked is None else asked
    return _numeric(meta, "action_keys", keys, ValueError if asked is None else OptionError)


def _numeric(meta: Meta, name: str, keys: Sequence[str], error: type[ValueError]) -> tuple[str, ...]:
    there = [key for key in meta.features if meta.numeric(key) and key not in REQUIRED]
    unknown = [key for key in keys if key not in there]
    if unknown or not keys:
        wrong = f"{unknown} are not among them" if unknown else "none has a usual name"
        raise error(f"{meta.info_path}: {name}: the numeric features are {', '.join(there)}; {wrong}. Name {name}.")
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
    needed = {"fps": RATE, "features": OBJECT, "total_episodes": COUNT, "total_frames": COUNT, "data_path": TEXT}
    _check(str(path), info, needed)
    _check(f"{path}: features", info["features"], dict.fromkeys(info["features"], OBJECT))
    for key, feature in info["features"].items():
        where = f"{path}: features: {key}"
        _check(where, feature, {"dtype": TEXT})
        if is_numeric(feature["dtype"]):
            _check(where, feature, {"shape": SHAPE})
    if any(feature["dtype"] == "video" for feature in info["features"].values()):
        if not info.get("video_path"):
            raise ValueError(f"{path}: video_path is missing, though some features are stored as video")
        _check(str(path), info, {"video_path": TEXT})
    optional = {"chunks_size": SIZE, "total_tasks": COUNT}
    _check(str(path), info, {key: kind for key, kind in optional.items() if key in info})


def _file_of(root: Path, info: Mapping[str, Any], kind: Literal["data_path", "video_path"], **names: Any) -> Path:
    """The file that a template of info.json gives."""
    try:
        return root / info[kind].format(**names)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{root / 'meta/info.json'}: {kind}: expected a template of the names {', '.join(names)}, found "
            f"{info[kind]!r} ({error})"
        ) from error


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
    lines = _read_lines(root / "meta/tasks.jsonl", {"task_index": COUNT, "task": TEXT})
    return {int(line["task_index"]): line["task"] for line in lines}


def _episodes_v2(root: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    rows = []
    for line in _read_lines(root / "meta/episodes.jsonl", {"episode_index": COUNT, "length": COUNT}):
        number = int(line["episode_index"])
        place = {"episode_chunk": number // int(info.get("chunks_size", DEFAULT_CHUNKS_SIZE)), "episode_index": number}
        videos = {key: VideoSpan(_file_of(root, info, "video_path", **place, video_key=key)) for key in cameras}
        file = _file_of(root, info, "data_path", **place)
        rows.append(EpisodeRow(number, int(line["length"]), file, None, videos))
    return rows


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.parquet"
    table = _read_table(path)
    texts = [name for name in table if name != "task_index"]
    if "task_index" not in table or len(texts) != 1:
        raise ValueError(f"{path}: expected task_index and one column of texts, found {', '.join(table)}")
    _check_rows(path, table, {"task_index": COUNT, texts[0]: TEXT})
    return dict(zip(table["task_index"], table[texts[0]], strict=True))


def _episodes_v3(root: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    files = files_by_number(root / "meta/episodes")
    if not files:
        raise ValueError(f"{root / 'meta/episodes'}: expected chunk-*/file-*.parquet, found none")
    return [row for file in files for row in _episodes_of(file, root, info, cameras)]


def _episodes_of(file: Path, root: Path, info: Mapping[str, Any], cameras: Sequence[str]) -> list[EpisodeRow]:
    table = _read_table(file)
    counts = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    counts += ["data/chunk_index", "data/file_index"]
    fields = {"chunk_index": COUNT, "file_index": COUNT, "from_timestamp": SECONDS, "to_timestamp": SECONDS}
    _check_rows(file, table, dict.fromkeys(counts, COUNT))
    _check_rows(file, table, {f"videos/{key}/{field}": kind for key in cameras for field, kind in fields.items()})

    @functools.cache  # ten thousand episodes lie in few files, and a path takes longer than the rest of a row
    def path_of(kind: Literal["data_path", "video_path"], chunk: int, number: int, key: str = "") -> Path:
        return _file_of(root, info, kind, chunk_index=int(chunk), file_index=int(number), video_key=key)

    def span(at: int, key: str) -> VideoSpan:
        chunk, number, start, stop = (table[f"videos/{key}/{field}"][at] for field in fields)
        return VideoSpan(path_of("video_path", chunk, number, key), start, stop)

    def row(at: int) -> EpisodeRow:
        path = path_of("data_path", table["data/chunk_index"][at], table["data/file_index"][at])
        indices = (int(table["dataset_from_index"][at]), int(table["dataset_to_index"][at]))
        videos = {key: span(at, key) for key in cameras}
        return EpisodeRow(int(table["episode_index"][at]), int(table["length"][at]), path, indices, videos)

    return [row(at) for at in range(len(table["episode_index"]))]


def _read_table(path: Path) -> dict[str, list[Any]]:
    """All columns by name but the per-episode statistics, which are big."""
    arrow = import_pyarrow()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the dataset is incomplete")
    try:
        file = arrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: column {twice!r} occurs more than once; expected one of each name")
        table = file.read(names)
        return {name: table[name].to_pylist() for name in names}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected texts in UTF-8, found invalid bytes ({error})") from error
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a complete parquet file ({error})") from error


def _read_lines(path: Path, kinds: Mapping[str, _Kind]) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        line = _parsed(f"{path}, line {number}", text)
        _check(f"{path}, line {number}", line, kinds)
        lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(str(path), _read_text(path))


def _parsed(where: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
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
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read ({error.strerror})") from error
