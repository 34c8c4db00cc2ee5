"""Episodes in HDF5, one file an episode (``episode_000000.hdf5``):

    /observations/state           (T, s)        float32
    /observations/images/<camera> (T, h, w, 3)  uint8, RGB, stored frame by frame; absent without cameras
    /actions                      (T, a)        float32, as executed
    /rewards                      (T,)          float32
    /terminals                    (T,)          bool, true where the task ended (a time limit does not end it)
    attributes of /: format="acrlpd", version=1, task (text), success (bool; absent: nobody knows), metadata (JSON)

State and actions are in raw units; row t holds what was seen, the action taken there and what it paid.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Shaped

from acrlpd.data.episodes import EpisodeInfo
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

    ``metadata`` is anything JSON can hold. ``compression`` (``"gzip"``, ``"lzf"``) applies to pictures.
    """
    path = Path(path)
    _check_episode(str(path), episode)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            _fill(file, episode, metadata or {}, compression)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return path


def read_episode(path: str | os.PathLike[str]) -> Episode:
    """Read and check one episode: finite, of one length, at least one step."""
    with _Reading(path) as file:
        _layout(str(path), file)
        images = file.get("observations/images", {})
        success = file.attrs.get("success")
        episode = Episode(
            state=_array(str(path), file, "observations/state", "f", np.float32),
            actions=_array(str(path), file, "actions", "f", np.float32),
            rewards=_array(str(path), file, "rewards", "f", np.float32),
            terminals=_array(str(path), file, "terminals", "b", np.bool_),
            task=str(file.attrs["task"]),
            images={name: _array(str(path), file, f"observations/images/{name}", "u", np.uint8) for name in images},
            success=None if success is None else bool(success),
            source=str(path),
        )
    _check_episode(str(path), episode)
    return episode


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    with _Reading(path) as file:
        _layout(str(path), file)
        return json.loads(file.attrs.get("metadata", "{}"))


class Header(NamedTuple):
    """What must agree across the episodes of a data set, and what need not."""

    info: EpisodeInfo
    state_dim: int
    action_dim: int
    image_shapes: dict[str, tuple[int, ...]]  # by camera: (h, w, 3)


class H5DatasetReader:
    """The episodes of a folder, ordered by the number in their name: an ``EpisodeSource``.

    Nothing but headers is read at construction. ``episode`` checks every number; ``window`` reads its rows as they are.
    """

    def __init__(self, data_dir: str | os.PathLike[str]):
        self.data_dir = Path(data_dir)
        self.paths = _episode_files(self.data_dir)
        headers = [_read_header(path) for path in self.paths]
        _check_same(self.paths, headers)
        self._infos = [header.info for header in headers]
        self.lengths = np.array([info.length for info in self._infos])
        self.state_dim = headers[0].state_dim
        self.action_dim = headers[0].action_dim
        self.cameras = tuple(headers[0].image_shapes)

    @property
    def num_episodes(self) -> int:
        return len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Episode]:
        return (read_episode(path) for path in self.paths)

    def info(self, index: int) -> EpisodeInfo:
        return self._infos[index]

    def episode(self, index: int) -> Episode:
        return read_episode(self.paths[index])

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        path, length = self.paths[index], self._infos[index].length
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{path}: window {start}..{stop} leaves the episode (0..{length})")
        place = key if key in ("actions", "rewards", "terminals") else f"observations/{key}"
        with _Reading(path) as file:
            return _dataset(str(path), file, place)[start:stop]


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Reading:
    """An open HDF5 file in which every I/O error names the file and says what is likely wrong."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def __enter__(self) -> h5py.File:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise self._damaged(error) from error
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self.file.close()
        if isinstance(error, OSError):
            raise self._damaged(error) from error

    def _damaged(self, error: OSError) -> ValueError:
        return ValueError(f"{self.path}: expected a complete HDF5 file; it is truncated or not HDF5 ({error})")


def _fill(file: h5py.File, episode: Episode, metadata: Mapping[str, Any], compression: str | None) -> None:
    file.attrs.update(format=FORMAT, version=VERSION, task=episode.task, metadata=json.dumps(dict(metadata)))
    if episode.success is not None:
        file.attrs["success"] = bool(episode.success)
    file.create_dataset("observations/state", data=episode.state, dtype=np.float32)
    file.create_dataset("actions", data=episode.actions, dtype=np.float32)
    file.create_dataset("rewards", data=episode.rewards, dtype=np.float32)
    file.create_dataset("terminals", data=episode.terminals, dtype=np.bool_)
    for camera, frames in episode.images.items():
        # One frame a chunk: a sample reads two frames of an episode, not all of them.
        file.create_dataset(
            f"observations/images/{camera}", data=frames, chunks=(1, *frames.shape[1:]), compression=compression
        )


def _layout(where: str, file: h5py.File) -> None:
    """The one place that tells layouts apart: raises unless ``file`` holds an episode as described above."""
    found = file.attrs.get("format")
    if found != FORMAT:
        raise ValueError(
            f"{where}: expected the attribute format={FORMAT!r} on '/', found {found!r} (keys: {sorted(file)}). "
            "The file has another layout, which this reader does not know."
        )
    if file.attrs.get("version") != VERSION:
        raise ValueError(
            f"{where}: expected version={VERSION}, found {file.attrs.get('version')!r}. "
            "The file was written by another release of acrlpd; upgrade, or write it again."
        )
    if "task" not in file.attrs:
        raise ValueError(f"{where}: expected the attribute 'task' (the instruction, as text) on '/', found none")


def _dataset(where: str, file: h5py.File, key: str) -> h5py.Dataset:
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where}: {key}: expected a dataset, found {'nothing' if found is None else 'a group'}")
    return found


def _array(where: str, file: h5py.File, key: str, kind: str, dtype: type[np.generic]) -> np.ndarray:
    data = _dataset(where, file, key)
    if data.dtype.kind != kind:
        raise ValueError(f"{where}: {key}: expected {np.dtype(dtype)}, found {data.dtype}")
    return data[...].astype(dtype, copy=False)


def _check_episode(where: str, episode: Episode) -> None:
    length = len(episode.actions)
    if length < 1:
        raise ValueError(f"{where}: actions: expected at least 1 step, found 0. Leave empty episodes out.")
    arrays = {"observations/state": (episode.state, 2), "actions": (episode.actions, 2)}
    arrays |= {"rewards": (episode.rewards, 1), "terminals": (episode.terminals, 1)}
    arrays |= {f"observations/images/{camera}": (frames, 4) for camera, frames in episode.images.items()}
    for key, (array, rank) in arrays.items():
        if array.ndim != rank:
            raise ValueError(f"{where}: {key}: expected {rank} axes, found shape {array.shape}")
        if len(array) != length:
            raise ValueError(f"{where}: {key}: expected {length} rows (as in actions), found {len(array)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise ValueError(f"{where}: {key}: expected finite numbers, found {array[row]} in row {row}")
        if rank == 4 and (array.shape[-1] != 3 or array.dtype != np.uint8):
            raise ValueError(f"{where}: {key}: expected uint8 (T, h, w, 3), found {array.dtype} {array.shape}")


def _episode_files(data_dir: Path) -> list[Path]:
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder. Point data_dir at a folder of episode_*.hdf5 files.")
    files = [path for path in data_dir.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise ValueError(
            f"{data_dir}: expected files named episode_*.hdf5, found none. Record some with `acrlpd collect`, "
            "or point data_dir at the folder that holds them."
        )
    unnumbered = [path.name for path in files if episode_number(path) is None]
    if unnumbered:
        raise ValueError(f"{data_dir}: expected names that end in a number, found {sorted(unnumbered)[:5]}")
    return sorted(files, key=lambda path: (episode_number(path), path.name))


def _read_header(path: Path) -> Header:
    where = str(path)
    with _Reading(path) as file:
        _layout(where, file)
        state = _dataset(where, file, "observations/state").shape
        actions = _dataset(where, file, "actions").shape
        for key, shape in {"observations/state": state, "actions": actions}.items():
            if len(shape) != 2:
                raise ValueError(f"{where}: {key}: expected 2 axes, found shape {shape}")
        if actions[0] < 1:
            raise ValueError(f"{where}: actions: expected at least 1 step, found 0. Delete the file.")
        cameras = file.get("observations/images", {})
        images = {name: _dataset(where, file, f"observations/images/{name}").shape[1:] for name in cameras}
        success = file.attrs.get("success")
        known = None if success is None else bool(success)
        info = EpisodeInfo(actions[0], str(file.attrs["task"]), known, where)
        return Header(info, state[1], actions[1], images)


def _check_same(paths: list[Path], headers: list[Header]) -> None:
    first = headers[0]
    names = {"state_dim": "observations/state", "action_dim": "actions", "image_shapes": "observations/images"}
    for path, header in zip(paths, headers, strict=True):
        for field, key in names.items():
            expected, found = getattr(first, field), getattr(header, field)
            if found != expected:
                raise ValueError(f"{path}: {key}: expected {field} {expected} (as in {paths[0].name}), found {found}")
