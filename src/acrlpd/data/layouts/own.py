"""Episodes in HDF5, one file an episode (``episode_000000.hdf5``):

    /observations/state           (T, s)        float32
    /observations/images/<camera> (T, h, w, 3)  uint8, RGB, frame after frame; absent without cameras
    /actions                      (T, a)        float32, as executed
    /rewards                      (T,)          float32
    /terminals                    (T,)          bool, true where the task ended (a time limit does not end it)
    attributes of /: format="acrlpd", version=1, task (text), success (bool; absent: nobody knows), metadata (JSON)

``fps`` in the metadata is the rate of the recording. State and actions are in raw units; row t holds what was seen, the
action taken there and what it paid.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acrlpd.data.episodes import IMAGE_PREFIX
from acrlpd.data.layouts import columns
from acrlpd.data.layouts.columns import Column, Joined, Options, Reading, Record
from acrlpd.files import temporary_path
from acrlpd.types import Episode

FORMAT = "acrlpd"
VERSION = 1
SUFFIXES = (".hdf5", ".h5")


def episode_path(folder: str | os.PathLike[str], number: int) -> Path:
    return Path(folder) / f"episode_{number:06d}.hdf5"


def episode_number(path: str | os.PathLike[str]) -> int | None:
    """The number that ends the file's name, or None."""
    found = re.search(r"(\d+)$", Path(path).stem)
    return int(found[1]) if found else None


def write_episode(
    path: str | os.PathLike[str],
    episode: Episode,
    metadata: Mapping[str, Any] | None = None,
    *,
    compression: str | None = None,
) -> Path:
    """Write the whole episode or nothing: a crash leaves at most a hidden temporary file beside ``path``.

    ``metadata`` is anything JSON can hold. ``compression`` (``"gzip"``, ``"lzf"``) applies to pictures. The file is
    made in memory first, because the HDF5 library may crash where it cannot write.

    Raises:
        OSError: the disk is full, or the file larger than allowed; names the file.
        ValueError: not what ``read_episode`` would read; names the key, and nothing is written.
    """
    path = Path(path)
    _check_episode(str(path), episode)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _fill(file, episode, metadata or {}, compression)
    try:
        with temporary.open("wb") as output:
            output.write(content.getbuffer())
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the episode: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return path


def read_episode(path: str | os.PathLike[str]) -> Episode:
    """Read and check one episode: finite, of one length, at least one step."""
    with Reading(Path(path)) as file:
        check_layout(str(path), file)
        images = columns.names(str(path), file, "observations/images")
        episode = Episode(
            state=_array(str(path), file, "observations/state", "f", np.float32),
            actions=_array(str(path), file, "actions", "f", np.float32),
            rewards=_array(str(path), file, "rewards", "f", np.float32),
            terminals=_array(str(path), file, "terminals", "b", np.bool_),
            task=columns.text(str(path), "task", file.attrs["task"]),
            images={name: _array(str(path), file, f"observations/images/{name}", "u", np.uint8) for name in images},
            success=columns.flag(str(path), "success", file.attrs.get("success")),
            source=str(path),
        )
    _check_episode(str(path), episode)
    return episode


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    with Reading(Path(path)) as file:
        check_layout(str(path), file)
        return columns.json_text(str(path), "metadata", file.attrs.get("metadata"))


class Own:
    """Episodes in this layout, one a file."""

    name = "acrlpd"

    def __init__(self, paths: Sequence[Path], options: Options):
        options.only(self.name)
        self._options = options
        self._paths = paths
        self.sources = [str(path) for path in paths]
        self.fps = options.fps or _stated_fps(paths)

    def scan(self, index: int) -> Record:
        where = self.sources[index]
        with Reading(self._paths[index]) as file:
            check_layout(where, file)
            metadata = columns.json_text(where, "metadata", file.attrs.get("metadata"))
            if self._options.fps is None:
                _fps(where, metadata)
            recorded = columns.names(where, file, "observations/images")
            cameras = columns.choose_cameras(where, recorded, self._options.cameras)
            found: dict[str, Column] = {
                "state": Joined((columns.numbers(where, file, "observations/state", kinds="f", ranks=(2,)),)),
                "actions": Joined((columns.numbers(where, file, "actions", kinds="f", ranks=(2,)),)),
            }
            for camera in cameras:
                found[IMAGE_PREFIX + camera] = columns.raw_pictures(where, file, f"observations/images/{camera}")
            record = Record(
                found,
                columns.text(where, "task", file.attrs["task"]) or self._options.default_task,
                columns.flag(where, "success", file.attrs.get("success")),
                columns.vector(where, file, "rewards", kinds="f").astype(np.float32),
                columns.vector(where, file, "terminals", kinds="b"),
            )
        return columns.checked(where, record)


def _stated_fps(paths: Sequence[Path]) -> float | None:
    """From the metadata of the first file that can be read; ``acrlpd data convert`` puts it there."""
    for path in paths:
        with contextlib.suppress(ValueError, OSError):  # damaged: told when its episode is read
            return _fps(str(path), read_metadata(path))
    return None


def _fps(where: str, metadata: Mapping[str, Any]) -> float | None:
    fps = metadata.get("fps")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < np.inf):
        raise ValueError(f"{where}: attribute metadata: expected a positive fps, found {fps!r}")
    return None if fps is None else float(fps)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(file: h5py.File, episode: Episode, metadata: Mapping[str, Any], compression: str | None) -> None:
    file.attrs.update(format=FORMAT, version=VERSION, task=episode.task, metadata=json.dumps(dict(metadata)))
    if episode.success is not None:
        file.attrs["success"] = bool(episode.success)
    file.create_dataset("observations/state", data=episode.state, dtype=np.float32)
    file.create_dataset("actions", data=episode.actions, dtype=np.float32)
    file.create_dataset("rewards", data=episode.rewards, dtype=np.float32)
    file.create_dataset("terminals", data=episode.terminals, dtype=np.bool_)
    for camera, frames in episode.images.items():
        # One frame a chunk, or one after the other: a sample reads two frames of an episode, not all of them.
        chunks = None if compression is None else (1, *frames.shape[1:])
        file.create_dataset(f"observations/images/{camera}", data=frames, chunks=chunks, compression=compression)


def check_layout(where: str, file: h5py.File) -> None:
    """Raises unless ``file`` holds an episode as described above."""
    found = file.attrs.get("format")
    if not isinstance(found, str) or found != FORMAT:
        raise ValueError(
            f"{where}: expected the attribute format={FORMAT!r} on '/', found {found!r} (keys: {sorted(file)}). "
            "The file has another layout."
        )
    if not np.array_equal(file.attrs.get("version"), VERSION):
        raise ValueError(
            f"{where}: expected version={VERSION}, found {file.attrs.get('version')!r}. "
            "The file was written by another release of acrlpd; upgrade, or write it again."
        )
    if "task" not in file.attrs:
        raise ValueError(f"{where}: expected the attribute 'task' (the instruction, as text) on '/', found none")


def _array(where: str, file: h5py.File, key: str, kind: str, dtype: type[np.generic]) -> np.ndarray:
    data = columns.dataset(where, file, key)
    if data.dtype.kind != kind:
        raise ValueError(f"{where}: {key}: expected {np.dtype(dtype)}, found {data.dtype}")
    return data[...].astype(dtype, copy=False)


def _check_episode(where: str, episode: Episode) -> None:
    if not isinstance(episode.task, str):
        raise ValueError(f"{where}: task: expected text, found {type(episode.task).__name__}")
    columns.flag(where, "success", episode.success)
    arrays = {"observations/state": (episode.state, 2), "actions": (episode.actions, 2)}
    arrays |= {"rewards": (episode.rewards, 1), "terminals": (episode.terminals, 1)}
    arrays |= {f"observations/images/{camera}": (frames, 4) for camera, frames in episode.images.items()}
    for key, (array, rank) in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            found = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"{where}: {key}: expected an array of numbers, found {found}")
        if array.ndim != rank:
            raise ValueError(f"{where}: {key}: expected {rank} axes, found shape {array.shape}")
    length = len(episode.actions)
    if length < 1:
        raise ValueError(f"{where}: actions: expected at least 1 step, found 0. Leave empty episodes out.")
    for key, (array, rank) in arrays.items():
        if len(array) != length:
            raise ValueError(f"{where}: {key}: expected {length} rows (as in actions), found {len(array)}")
        columns.check_finite(where, key, np.asarray(array))
        if rank == 4 and (array.shape[-1] != 3 or array.dtype != np.uint8):
            raise ValueError(f"{where}: {key}: expected uint8 (T, h, w, 3), found {array.dtype} {array.shape}")
