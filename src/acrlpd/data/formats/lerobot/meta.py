"""The tables of a LeRobot dataset, v2.0, v2.1 or v3.0, in one form: the rows and frames of each episode.

    v2   meta/tasks.jsonl    meta/episodes.jsonl                    one parquet file and one mp4 per camera per episode
    v3   meta/tasks.parquet  meta/episodes/chunk-*/file-*.parquet   many episodes share a parquet file or an mp4

Errors found here concern the set as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import reprlib
import string
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from acrlpd import files
from acrlpd.data.formats.parquet import DataError, checked, import_pyarrow
from acrlpd.data.formats.pictures import DEPTH_BY_NAME, NOT_CHOSEN, is_depth
from acrlpd.data.store.episodes import OptionError, told_numbers

PICTURES = ("image", "video")  # dtypes of cameras
DEFAULT_CHUNKS_SIZE = 1000
MAX_ROWS = 10_000_000  # max size of a table of episodes or tasks
TIMESTAMP, INDEX, TASK_INDEX = "timestamp", "index", "task_index"
REWARD, SUCCESS = "next.reward", "next.success"
TERMINAL = "next.terminal"  # true where the task ended; only datasets that acrlpd wrote have this column
REQUIRED = (TIMESTAMP, "frame_index", "episode_index", INDEX, TASK_INDEX)  # columns of every dataset
STATE_KEYS = (("observation.state",), ("state",), ("joint_position", "gripper_position"))  # the first existing one
ACTION_KEYS = ("action", "actions")
CAMERA_PREFIXES = ("observation.images.", "observation.")  # removed from camera names


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of value in a table, with its description and its check."""

    told: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value) and abs(value) < 2**62


COUNT = _Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
SIZE = _Kind("a whole number from 1", lambda value: _is_whole(value) and value >= 1)
SECONDS = _Kind("a number of seconds", lambda value: _is_number(value) and abs(value) < 1e9)
RATE = _Kind("a number above 0", lambda value: _is_number(value) and value > 0)
TEXT = _Kind("text", lambda value: isinstance(value, str))
OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
SHAPE = _Kind("a list of whole numbers", lambda value: isinstance(value, list) and all(map(COUNT.holds, value)))


def _check(where: str, content: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> None:
    """Raise unless ``content`` has all of these keys, each with a value of its kind."""
    for key, kind in kinds.items():
        if key not in content:
            raise ValueError(f"{where}: {key} is missing, expected {kind.told}; it has {files.listed(content)}")
        if not kind.holds(content[key]):
            raise ValueError(f"{where}: {key}: expected {kind.told}, found {reprlib.repr(content[key])}")


def _check_rows(path: Path, table: Mapping[str, Sequence[Any]], kinds: Mapping[str, _Kind]) -> None:
    for key, kind in kinds.items():
        if key not in table:
            raise ValueError(f"{path}: column {key!r} is missing; the table has {files.listed(table)}")
        wrong = next((at for at, value in enumerate(table[key]) if not kind.holds(value)), None)
        if wrong is not None:
            found = reprlib.repr(table[key][wrong])
            raise ValueError(f"{path}, row {wrong}: {key}: expected {kind.told}, found {found}")


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """The place of an episode's frames in an mp4: at ``start_s + timestamp``, before ``stop_s``."""

    path: Path
    start_s: float = 0.0
    stop_s: float = np.inf


@dataclasses.dataclass(frozen=True)
class EpisodeRow:
    """An episode as described in the tables."""

    number: int
    length: int
    file: Path  # the parquet file with its rows
    indices: tuple[int, int] | None  # half-open range of global indices (v3); None: all rows of the file (v2)
    videos: dict[str, VideoSpan]  # by feature


@dataclasses.dataclass(frozen=True)
class Meta:
    root: Path
    version: str
    fps: float
    total_frames: int
    features: dict[str, dict[str, Any]]
    video_path: str | None  # the template
    tasks: dict[int, str]
    episodes: list[EpisodeRow]  # episode n is at index n
    robot_type: str | None = None  # None if unknown

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
        """Features with pictures: encoded ones, uint8 with three axes, or numbers with the name of images."""
        return [key for key, feature in self.features.items() if _is_camera(key, feature)]


def read(root: Path) -> Meta:
    """Read the tables and check that they agree.

    Raises:
        ValueError: the version is unknown, a table cannot be read, or totals and numbers do not agree.
    """
    path = root / "meta/info.json"
    with _complete():
        info = files.read_json(path)
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
    totals = (float(info["fps"]), int(info["total_frames"]))
    return Meta(root, version, *totals, info["features"], info.get("video_path"), tasks, episodes, robot)


def is_numeric(dtype: str) -> bool:
    """Return whether a feature of this dtype holds numbers or flags."""
    try:  # np.dtype would also accept shapes, structures and texts of any length
        return bool(re.fullmatch(r"[a-z]+\d{0,3}", dtype)) and np.dtype(dtype).kind in "biuf"
    except (TypeError, ValueError):
        return False


def is_v3(version: str) -> bool:
    return version.startswith("v3")


def files_by_number(folder: Path) -> list[Path]:
    """Return ``chunk-*/file-*.parquet`` sorted by number, because numbers above 999 have more digits."""

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
        wrong = f"{unknown} are not among them" if unknown else "none has a name that is looked for"
        raise error(
            f"{meta.info_path}: the numeric features are {files.listed(there)}; {wrong}. Set {name} to those to read."
        )
    return tuple(keys)


def camera_keys(meta: Meta, asked: Sequence[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the features to read by camera name, and for each camera that is not read the reason.

    A camera's name is its feature's without prefix, or all of it where two cameras would otherwise have the same name.
    A numeric feature with several axes counts as a camera if ``asked`` names it.
    """
    names = _camera_names(meta, set(asked or ()))
    keys = {name: key for key, name in names.items()}
    wanted = [names.get(name, name) for name in asked or ()]
    unknown = [name for name in wanted if name not in keys]
    if unknown:
        raise OptionError(f"{meta.info_path}: no camera {', '.join(unknown)}; the cameras are {files.listed(keys)}")
    depth = {name: why for name, key in keys.items() if (why := _depth(key, meta.features[key]))}
    if asked is None:
        return {name: key for name, key in keys.items() if name not in depth}, depth
    if refused := [name for name in wanted if name in depth]:
        raise OptionError(f"{meta.info_path}: {refused[0]}: {depth[refused[0]]}. Leave it out of cameras.")
    others = [name for name in keys if wanted and name not in wanted]
    return {name: keys[name] for name in wanted}, dict.fromkeys(others, NOT_CHOSEN)


def _camera_names(meta: Meta, asked: Collection[str]) -> dict[str, str]:
    """Return the name of each camera, by feature."""
    short = {
        key: _camera_name(key)
        for key, feature in meta.features.items()
        if _is_camera(key, feature) or (_has_axes(feature) and {key, _camera_name(key)} & set(asked))
    }
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _is_camera(key: str, feature: Mapping[str, Any]) -> bool:
    raw = (feature["dtype"] == "uint8" and len(feature["shape"]) == 3) or key.startswith(CAMERA_PREFIXES[0])
    return feature["dtype"] in PICTURES or (raw and _has_axes(feature))


def _has_axes(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature may hold pictures as numbers."""
    return is_numeric(feature["dtype"]) and len(feature["shape"]) > 1


def _depth(key: str, feature: Mapping[str, Any]) -> str | None:
    """Return why a feature is a depth camera, by its declaration or its name; None if it is not."""
    about = [feature, *(found for name in ("info", "video_info") if isinstance(found := feature.get(name), dict))]
    if any(value for each in about for name, value in each.items() if name.rpartition(".")[2] == "is_depth_map"):
        return "it is declared as a depth camera (is_depth_map)"
    return DEPTH_BY_NAME if is_depth(key) else None


def unused(meta: Meta, used: Collection[str]) -> list[str]:
    """Describe the unused numeric features that could be part of the state or the actions."""
    return [
        f"{key} ({told_numbers(feature['shape'])})"
        for key, feature in meta.features.items()
        if meta.numeric(key) and key not in (*used, *REQUIRED) and not key.startswith("next.")
    ]


def _camera_name(key: str) -> str:
    for prefix in CAMERA_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _version(path: Path, info: Mapping[str, Any]) -> str:
    version = str(info.get("codebase_version", "missing"))
    if not re.fullmatch(r"v[23](\.\d+)*", version):
        raise ValueError(
            f"{path}: codebase_version is {version:.20}, and only v2.0, v2.1 and v3.0 are known. "
            "Convert the dataset with LeRobot's own scripts."
        )
    return version


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    needed = {"fps": RATE, "features": OBJECT, "total_episodes": COUNT, "total_frames": COUNT, "data_path": TEXT}
    _check(str(path), info, needed)
    _check(f"{path}: features", info["features"], dict.fromkeys(info["features"], OBJECT))
    for key, feature in info["features"].items():
        files.inside(path.parent, key, f"{path}: features")
        where = f"{path}: features: {key}"
        _check(where, feature, {"dtype": TEXT})
        if is_numeric(feature["dtype"]):
            _check(where, feature, {"shape": SHAPE})
    names = ["chunk_index", "file_index"] if is_v3(_version(path, info)) else ["episode_chunk", "episode_index"]
    _check_template(path.parent.parent, info, "data_path", [""], names)
    filmed = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    if filmed:
        if not info.get("video_path"):
            raise ValueError(f"{path}: video_path is missing, though some features are stored as video")
        _check(str(path), info, {"video_path": TEXT})
        _check_template(path.parent.parent, info, "video_path", filmed, [*names, "video_key"])
    optional = {"chunks_size": SIZE, "total_tasks": COUNT}
    _check(str(path), info, {key: kind for key, kind in optional.items() if key in info})


def _file_of(root: Path, info: Mapping[str, Any], kind: Literal["data_path", "video_path"], **names: Any) -> Path:
    """Return the file of a template in info.json; it lies inside ``root``, see ``_check_template``."""
    return root / info[kind].format(**names)


FORMATS = re.compile(r"0?\d{0,2}d?")  # allowed format of a number in a template, such as 03d


def _check_template(root: Path, info: Mapping[str, Any], kind: str, keys: Sequence[str], names: Sequence[str]) -> None:
    """Raise unless a template in info.json has only these names and leads to files inside ``root``.

    Checking it with 0 for all numbers is enough, because numbers are written as digits.
    """
    where = f"{root / 'meta/info.json'}: {kind}"
    template = files.check_name(info[kind], where)
    told = f"{where}: expected a template of the names {', '.join(names)}, found {template!r}"
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{told} ({error})") from error
    for name, spec, how in fields:
        if name not in names or how or not FORMATS.fullmatch(spec or "") or (name == "video_key" and spec):
            raise ValueError(told)
    for key in keys:
        numbers = dict.fromkeys(names, 0)
        files.inside(root, template.format(**{**numbers, "video_key": key}), where)


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
    path = root / "meta/tasks.jsonl"
    lines = _read_lines(path, {"task_index": COUNT, "task": TEXT})
    return _texts(path, [line["task_index"] for line in lines], [line["task"] for line in lines])


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
        raise ValueError(f"{path}: expected task_index and one column of texts, found {files.listed(table)}")
    _check_rows(path, table, {"task_index": COUNT, texts[0]: TEXT})
    return _texts(path, table["task_index"], table[texts[0]])


def _texts(path: Path, indices: Sequence[Any], texts: Sequence[str]) -> dict[int, str]:
    """Return the text of each task_index; refuse two texts for one index."""
    found: dict[int, str] = {}
    for index, text in zip(map(int, indices), texts, strict=True):
        if found.setdefault(index, text) != text:
            raise ValueError(
                f"{path}: task_index {index}: expected one text, found {found[index]!r} and {text!r}. Give each "
                "text an index of its own."
            )
    return found


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

    @functools.cache  # 10,000 episodes lie in few files, and making a path takes longer than the rest of a row
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
    """Read all columns by name except the per-episode statistics, which are large."""
    arrow = import_pyarrow()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the dataset is incomplete")
    try:
        file = arrow.parquet.ParquetFile(path)
        if checked(file.metadata, path).num_rows > MAX_ROWS:
            raise ValueError(f"{path}: expected a table of at most {MAX_ROWS} rows, found {file.metadata.num_rows}")
        names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: column {twice!r} occurs more than once; expected one of each name")
        table = file.read(names)
        return {name: table[name].to_pylist() for name in names}
    except DataError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected texts in UTF-8, found invalid bytes ({error})") from error
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a complete parquet file ({files.one_line(error)})") from error


def _read_lines(path: Path, kinds: Mapping[str, _Kind]) -> list[dict[str, Any]]:
    lines = []
    with _complete():
        for where, text in files.read_lines(path):
            if text.strip():
                lines.append(files.parse_json(text, where))
                _check(where, lines[-1], kinds)
    return lines


@contextlib.contextmanager
def _complete() -> Iterator[None]:
    """Report a missing file as a fault of the dataset."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{error}; the dataset is incomplete") from error
