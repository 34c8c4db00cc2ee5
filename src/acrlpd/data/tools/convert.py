"""Conversion of any data set to our own HDF5 layout, or to LeRobot v3.0 with videos.

A new data set appears under its name only when it is complete and has been read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.checks import told_size
from acrlpd.data.formats.lerobot.meta import (
    DEFAULT_CHUNKS_SIZE,
    INDEX,
    REWARD,
    SUCCESS,
    TASK_INDEX,
    TERMINAL,
    TIMESTAMP,
)
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.formats.parquet import import_pyarrow
from acrlpd.data.formats.video import import_av
from acrlpd.data.sources import Dataset
from acrlpd.data.statistics import RunningStats
from acrlpd.data.store.episodes import check_fps, step_tasks, task_runs
from acrlpd.data.store.finals import has_final
from acrlpd.data.store.windows import check_videos
from acrlpd.files import inside, written_whole
from acrlpd.types import Episode

logger = logging.getLogger(__name__)

Pictures = Literal["av1", "h264", "png"]

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200  # a file of at least this size is followed by a new one
ENCODERS: Mapping[str, tuple[str, dict[str, str]]] = {
    # a key frame every 2nd frame, as in LeRobot: a random frame costs at most two decodes
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "8"}),
    "h264": ("libx264", {"g": "2", "crf": "18", "bf": "0"}),
}
# frames per second: the AV1 encoder accepts no more, and readers can distinguish times 0.1 ms apart
MIN_RATE, MAX_RATES = 1e-4, {"av1": 240.0, "h264": 1000.0}
STATE, ACTION, DONE = "observation.state", "action", "next.done"
FRAMES_FOR_STATS = 10  # frames per episode and camera
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def to_hdf5(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    compression: str | None = None,
    success: bool | None = None,
) -> Path:
    """Write our own layout, one file per episode; see ``layouts/own.py``. Pictures are raw or losslessly compressed.

    ``success`` is the user's statement for the episodes whose success is unknown.
    """
    check_videos(dataset)
    with _new_folder(Path(folder)) as temporary:
        for index in range(dataset.num_episodes):
            episode = _with_success(dataset.episode(index), success)
            metadata: dict[str, Any] = {"converted_from": episode.source}
            if dataset.fps is not None:
                metadata["fps"] = dataset.fps
            hdf5.write_episode(hdf5.episode_path(temporary, index), episode, metadata, compression=compression)
        _read_back(H5DatasetReader, temporary, Path(folder))
    return Path(folder)


def to_lerobot(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    fps: float | None = None,
    pictures: Pictures = "av1",
    robot_type: str | None = None,
    success: bool | None = None,
) -> Path:
    """Write LeRobot v3.0. Videos are slightly lossy; ``"png"`` embeds lossless pictures.

    ``next.success`` is written if the success of every episode is known. Our own column ``next.terminal`` keeps where
    the task ended. ``success`` is the user's statement for the episodes whose success is unknown.

    The format cannot hold final observations: a warning says so if there are any.

    Raises:
        ValueError: the rate is unknown, or the success of some but not all episodes.
    """
    rate = dataset.fps if fps is None else check_fps(fps)
    if rate is None:
        raise ValueError("LeRobot needs the frame rate, which this data set does not say: give fps (--fps 50)")
    successes = [dataset.info(index).success for index in range(dataset.num_episodes)]
    unknown = successes.count(None) if success is None else 0
    if 0 < unknown < len(successes):
        example = dataset.info(successes.index(None)).source
        raise ValueError(
            f"{example}: success: unknown in {unknown} of {len(successes)} episodes, which LeRobot cannot say. "
            "Say how they ended: --success True (in Python success=True) if they succeeded, False if they failed."
        )
    check_videos(dataset)
    if num_finals := int(has_final(dataset, dataset.num_episodes).sum()):
        logger.warning(
            "%s: LeRobot cannot hold the observation after the last action (%d of %d episodes have it): the last "
            "window of an episode that was cut will stay out of the TD loss. --to hdf5 keeps it.",
            *(folder, num_finals, dataset.num_episodes),
        )
    with _new_folder(Path(folder)) as temporary:
        writer = _LeRobotWriter(temporary, dataset, float(rate), pictures, success, with_success=unknown == 0)
        writer.write(robot_type)
        _read_back(LeRobotSource, temporary, Path(folder))
    return Path(folder)


def _with_success(episode: Episode, success: bool | None) -> Episode:
    """Return the episode with ``success`` if it has none; a task that succeeded ended at the last step."""
    if success is None or episode.success is not None:
        return episode
    last = np.arange(len(episode)) == len(episode) - 1
    terminals = episode.terminals if episode.terminals.any() else last & success
    return dataclasses.replace(episode, success=success, terminals=terminals)


def _read_back(reader: Callable[[Path], Dataset], temporary: Path, folder: Path) -> None:
    """Open the written data set. Errors name the final folder, because the temporary one is removed."""
    try:
        reader(temporary)
    except ValueError as error:
        reason = str(error).replace(str(temporary), str(folder))
        raise ValueError(f"the converted data set would not be readable: {reason}") from error


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes ``folder`` on success, unless that came into being meanwhile."""
    if folder.exists():
        raise ValueError(f"{folder} already exists. Name a folder that does not, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(folder, replaces=False) as temporary:
            temporary.mkdir()
            yield temporary
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        text = f"{os.strerror(error.errno)}; nothing was kept. Free some space, or write to another disk"
        raise OSError(error.errno, text, str(folder)) from error


@dataclasses.dataclass
class _Stretch:
    """The place of an episode's frames in one camera's video files."""

    file: int
    start_s: float
    stop_s: float


class _LeRobotWriter:
    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        fps: float,
        pictures: Pictures,
        success: bool | None,
        *,
        with_success: bool,
    ):
        self._folder = folder
        self._dataset = dataset
        self._fps = fps
        self._pictures = pictures
        self._success = success  # for episodes whose success is unknown
        self._with_success = with_success
        for camera in dataset.cameras:
            inside(folder, camera, "the name of a camera")
        self._cameras = {camera: f"observation.images.{camera}" for camera in dataset.cameras}
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, RunningStats] = {}
        self._counts: Counter[str] = Counter()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def write(self, robot_type: str | None) -> None:
        arrow = import_pyarrow()
        as_video = self._pictures != "png"
        videos = {
            key: _VideoFiles(self._folder, key, self._fps, self._pictures) for key in self._cameras.values() if as_video
        }
        table: list[dict[str, Any]] = []
        data = _DataFiles(self._folder)
        first = 0
        try:
            for number in range(self._dataset.num_episodes):
                columns, frames = self._columns(number, first)
                length = len(columns[INDEX])
                if not as_video:
                    columns |= {key: _png_cells(pictures) for key, pictures in frames.items()}
                file = data.write(self._table(arrow, columns))
                stretches = {key: files.write(frames[key]) for key, files in videos.items()}
                table.append(self._row(number, first, length, file, stretches))
                first += length
        finally:
            data.close()
            for files in videos.values():
                files.close()
        path = self._folder / EPISODES_PATH
        path.parent.mkdir(parents=True)
        arrow.parquet.write_table(arrow.Table.from_pylist(table), path)
        self._write_tasks(arrow)
        self._write_json("meta/stats.json", {key: self._feature_stats(key) for key in self._stats})
        self._write_json("meta/info.json", self._info(robot_type, first))

    def _columns(self, number: int, first: int) -> tuple[dict[str, Any], dict[str, UInt8[np.ndarray, "t h w 3"]]]:
        """Return an episode's columns under LeRobot's names, and its frames by feature."""
        episode = _with_success(self._dataset.episode(number), self._success)
        steps = np.arange(len(episode))
        last = steps == len(episode) - 1
        columns: dict[str, Any] = {STATE: episode.state, ACTION: episode.actions, REWARD: episode.rewards, DONE: last}
        if self._with_success:
            columns[SUCCESS] = (episode.terminals | last) & bool(episode.success)
        columns[TERMINAL] = episode.terminals
        columns |= {
            TIMESTAMP: (steps / self._fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(len(steps), number),
            INDEX: first + steps,
            TASK_INDEX: step_tasks(episode, self._tasks),
        }
        frames = {key: episode.images[camera] for camera, key in self._cameras.items()}
        for key, values in columns.items():
            self._shapes[key] = values.shape[1:] or (1,)
            self._count(key, values.reshape(len(values), -1).astype(np.float64), len(values))
        for key, images in frames.items():
            if self._shapes.setdefault(key, images.shape[1:]) != images.shape[1:]:
                raise ValueError(
                    f"{episode.source}: {key}: expected {told_size(self._shapes[key][:2])}, as in the episodes before, "
                    f"found {told_size(images.shape[1:3])}. Leave the episode out, or bring all to one size."
                )
            shown = images[np.unique(np.linspace(0, len(images) - 1, FRAMES_FOR_STATS).astype(int))]
            self._count(key, shown.reshape(-1, 3) / 255.0, len(shown))
        return columns, frames

    def _count(self, key: str, vectors: Float[np.ndarray, "n d"], count: int) -> None:
        """Add vectors to the statistics of a feature; ``count`` is the number that LeRobot counts."""
        self._stats.setdefault(key, RunningStats()).update(vectors)
        self._counts[key] += count

    def _feature_stats(self, key: str) -> dict[str, Any]:
        """Return LeRobot's statistics of a feature; those of pictures are by channel, from 0 to 1."""
        stats, shape = self._stats[key], (-1, 1, 1) if key in self._cameras.values() else (-1,)
        found = {"min": stats.low, "max": stats.high} | vars(stats.result())
        return {name: value.reshape(shape).tolist() for name, value in found.items()} | {"count": [self._counts[key]]}

    def _table(self, arrow: Any, columns: Mapping[str, Any]) -> Any:
        arrays = {key: _arrow_column(arrow, values) for key, values in columns.items()}
        features = {key: self._feature(key) for key in columns}
        about = json.dumps({"info": {"features": {key: _huggingface(each) for key, each in features.items()}}})
        return arrow.table(arrays).replace_schema_metadata({"huggingface": about})

    def _feature(self, key: str) -> dict[str, Any]:
        shape = list(self._shapes[key])
        if key in self._cameras.values():
            feature: dict[str, Any] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]}
            if self._pictures != "png":
                about: dict[str, Any] = {"height": shape[0], "width": shape[1], "channels": shape[2]}
                about |= {"codec": self._pictures, "pix_fmt": "yuv420p", "is_depth_map": False, "fps": self._rate}
                feature["dtype"] = "video"
                feature["info"] = {f"video.{name}": value for name, value in about.items()} | {"has_audio": False}
            return feature
        dtypes = {STATE: "float32", ACTION: "float32", REWARD: "float32", TIMESTAMP: "float32"}
        dtypes |= dict.fromkeys((DONE, SUCCESS, TERMINAL), "bool")
        return {"dtype": dtypes.get(key, "int64"), "shape": shape, "names": None}

    @property
    def _rate(self) -> int | float:
        return int(self._fps) if self._fps.is_integer() else self._fps

    def _row(
        self, number: int, first: int, length: int, file: int, stretches: Mapping[str, _Stretch]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(text for _, text in task_runs(self._dataset.info(number)))),
            "length": length,
            **_place("data", file),
            "dataset_from_index": first,
            "dataset_to_index": first + length,
        }
        for key, stretch in stretches.items():
            row |= _place(f"videos/{key}", stretch.file)
            row |= {f"videos/{key}/from_timestamp": stretch.start_s, f"videos/{key}/to_timestamp": stretch.stop_s}
        return row | _place("meta/episodes", 0)

    def _write_tasks(self, arrow: Any) -> None:
        """Write the task table like pandas: LeRobot reads the texts from the table's index."""
        names = {"task_index": ("task_index", "int64", "int64"), "__index_level_0__": (None, "unicode", "object")}
        about = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [],
            "columns": [
                {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
                for field, (name, kind, dtype) in names.items()
            ],
        }
        table = arrow.table({"task_index": list(self._tasks.values()), "__index_level_0__": list(self._tasks)})
        arrow.parquet.write_table(
            table.replace_schema_metadata({"pandas": json.dumps(about)}), self._folder / "meta/tasks.parquet"
        )

    def _info(self, robot_type: str | None, num_frames: int) -> dict[str, Any]:
        num_episodes = self._dataset.num_episodes
        return {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": num_episodes,
            "total_frames": num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": DEFAULT_CHUNKS_SIZE,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self._rate,
            "splits": {"train": f"0:{num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._cameras and self._pictures != "png" else None,
            "features": {key: self._feature(key) for key in self._shapes},
        }

    def _write_json(self, name: str, content: Any) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=4), encoding="utf-8")


class _DataFiles:
    """The parquet files, with one row group per episode."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._number = 0
        self._writer: Any = None

    def write(self, table: Any) -> int:
        """Write an episode and return the number of its file."""
        path = _file_path(self._folder, DATA_PATH, self._number)
        if self._writer is not None and path.stat().st_size >= DATA_FILE_MB << 20:
            self.close()
            self._number += 1
            path = _file_path(self._folder, DATA_PATH, self._number)
        if self._writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = import_pyarrow().parquet.ParquetWriter(path, table.schema)
        self._writer.write_table(table)
        return self._number

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _VideoFiles:
    """The mp4 files of one camera; an episode lies in a single file."""

    def __init__(self, folder: Path, key: str, fps: float, codec: str):
        self._av = import_av()
        self._folder = folder
        self._key = key
        self._rate = _video_rate(fps, codec)
        self._encoder, self._options = ENCODERS[codec]
        self._number = -1
        self._container: Any = None
        self._stream: Any = None
        self._frames = self._nbytes = 0  # in the current file
        os.environ.setdefault("SVT_LOG", "1")  # log errors only: the AV1 encoder prints its settings for every file

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> _Stretch:
        if self._container is None or self._nbytes >= VIDEO_FILE_MB << 20:
            self._begin_file(frames.shape[1:3])
        start = self._frames
        with self._named_errors():
            for picture in frames:
                frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = self._frames, 1 / self._rate
                self._mux(self._stream.encode(frame))
                self._frames += 1
        return _Stretch(self._number, float(start / self._rate), float(self._frames / self._rate))

    def close(self) -> None:
        if self._container is not None:
            with self._named_errors():
                self._mux(self._stream.encode())
                self._container.close()
            self._container = None

    def _mux(self, packets: Sequence[Any]) -> None:
        self._container.mux(packets)
        self._nbytes += sum(packet.size for packet in packets)

    @property
    def _path(self) -> Path:
        return _file_path(self._folder, VIDEO_PATH, self._number, video_key=self._key)

    def _begin_file(self, size: tuple[int, ...]) -> None:
        self.close()
        self._number += 1
        self._frames = self._nbytes = 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(self._path), "w")
        self._stream = self._container.add_stream(self._encoder, rate=self._rate, options=self._options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            self._container = None  # there is nothing to finish
            if error.errno in NO_ROOM:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            raise ValueError(
                f"{self._key}: {self._encoder} cannot encode frames of {self._stream.height}x{self._stream.width} "
                f"({error}). Choose another codec, or embed pictures (--pictures png)."
            ) from error


def _video_rate(fps: float, codec: str) -> Fraction:
    """Return a broadcast fraction (30000/1001) if it is the rate, else one so close that hours of video keep time."""
    highest = MAX_RATES[codec]
    if not MIN_RATE <= fps <= highest:
        raise ValueError(
            f"{codec} videos hold {MIN_RATE:g} to {highest:g} frames a second, and the rate is {fps:g}. Say the rate "
            "of the recording (--fps), choose another codec, or embed pictures (--pictures png)."
        )
    usual = Fraction(fps).limit_denominator(1001)
    return usual if abs(float(usual) - fps) <= 1e-9 * fps else Fraction(fps).limit_denominator(10**6)


def _file_path(folder: Path, template: str, number: int, **names: str) -> Path:
    chunk, file = divmod(number, DEFAULT_CHUNKS_SIZE)
    return inside(
        folder, template.format(chunk_index=chunk, file_index=file, **names), f"{folder}: the name of a camera"
    )


def _place(kind: str, number: int) -> dict[str, int]:
    chunk, file = divmod(number, DEFAULT_CHUNKS_SIZE)
    return {f"{kind}/chunk_index": chunk, f"{kind}/file_index": file}


def _png_cells(frames: UInt8[np.ndarray, "t h w 3"]) -> list[dict[str, Any]]:
    return [{"bytes": _png(frame), "path": f"frame-{number:06d}.png"} for number, frame in enumerate(frames)]


def _png(frame: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _arrow_column(arrow: Any, values: Any) -> Any:
    if isinstance(values, list):
        return arrow.array(values, arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}))
    if values.size == len(values):  # a feature of one number is a plain column
        return arrow.array(values.ravel())
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values.shape[1])


def _huggingface(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a column's feature in the form of the ``datasets`` library."""
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    (size,) = feature["shape"]
    return value if size == 1 else {"feature": value, "length": size, "_type": "List"}
