"""Our own HDF5 layout, one file per episode (``episode_000000.hdf5``):

    /observations/state           (T, s)        float32
    /observations/images/<camera> (T, h, w, 3)  uint8, RGB, frame after frame; absent without cameras
    /actions                      (T, a)        float32, as executed
    /rewards                      (T,)          float32
    /terminals                    (T,)          bool, true where the task ended (a time limit does not end it)
    /task_index, /tasks           (T,), (k,)    int32, text; only if the instruction changes inside the episode
    /final/state                  (1, s)        float32, observed after the last action; absent if not recorded
    /final/images/<camera>        (1, h, w, 3)  uint8, RGB, for every camera
    attributes of /: format="acrlpd", version=1, task (text), success (bool; absent if unknown), metadata (JSON)

``fps`` in the metadata is the rate of the recording. State and actions are in raw units; row t holds the observation,
the action taken on it and the reward for that action.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acrlpd import files
from acrlpd.data.formats.layouts import cameras, columns
from acrlpd.data.formats.layouts.columns import Joined, Options, Reading, Record
from acrlpd.data.store import finals
from acrlpd.data.store.episodes import check_task_changes, first_text, step_tasks
from acrlpd.types import Episode, FinalObservation

FORMAT = "acrlpd"
VERSION = 1
IMAGES = "observations/images"
NUMBERS = {"observations/state", "actions", "rewards", "terminals", "final/state", "task_index", "tasks"}
SUFFIXES = (".hdf5", ".h5")


def episode_path(folder: str | os.PathLike[str], number: int) -> Path:
    return Path(folder) / f"episode_{number:06d}.hdf5"


def episode_number(path: str | os.PathLike[str]) -> int | None:
    """Return the number at the end of the file's name, or None."""
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

    ``metadata`` may hold anything that JSON can. ``compression`` (``"gzip"``, ``"lzf"``) applies to pictures. The file
    is built in memory first, because the HDF5 library may crash if it cannot write.

    Raises:
        OSError: the disk is full, or the file is larger than allowed; the error names the file.
        ValueError: ``read_episode`` would refuse the episode; the error names the key, and nothing is written.
    """
    path = Path(path)
    _check_episode(str(path), episode)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _fill(file, episode, metadata or {}, compression)
    try:
        with files.written_whole(path) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, f"cannot write the episode: {error.strerror}", str(path)) from error
    return path


def read_episode(path: str | os.PathLike[str]) -> Episode:
    """Read one episode; check that it is finite, of one length and at least one step long."""
    with Reading(Path(path)) as file:
        check_layout(str(path), file)
        images = columns.names(str(path), file, IMAGES)
        episode = Episode(
            state=_array(str(path), file, "observations/state", "f", np.float32),
            actions=_array(str(path), file, "actions", "f", np.float32),
            rewards=_array(str(path), file, "rewards", "f", np.float32),
            terminals=_array(str(path), file, "terminals", "b", np.bool_),
            task=columns.text(str(path), "task", file.attrs["task"]),
            task_changes=_task_changes(str(path), file),
            images={name: _array(str(path), file, f"{IMAGES}/{name}", "u", np.uint8) for name in images},
            success=columns.flag(str(path), "success", file.attrs.get("success")),
            source=str(path),
            final=_read_final(str(path), file, images) if columns.find(str(path), file, "final") is not None else None,
        )
    _check_episode(str(path), episode)
    return episode


def _read_final(where: str, file: h5py.File, cameras: Sequence[str]) -> FinalObservation:
    state = _array(where, file, "final/state", "f", np.float32)
    images = {name: _array(where, file, f"final/images/{name}", "u", np.uint8) for name in cameras}
    for key, rows in {"state": state, **images}.items():
        if rows.ndim == 0 or len(rows) != 1:
            raise ValueError(f"{where}: final/{key}: expected 1 row, found the shape {rows.shape}")
    return FinalObservation(state[0], {name: rows[0] for name, rows in images.items()})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    with Reading(Path(path)) as file:
        check_layout(str(path), file)
        return columns.json_text(str(path), "metadata", file.attrs.get("metadata"))


class Own:
    """The episodes of a folder in this layout, one per file."""

    name = "acrlpd"

    def __init__(self, paths: Sequence[Path], options: Options):
        options.check(self.name)
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
            openers = {
                name: partial(cameras.stored, where, file, f"{IMAGES}/{name}")
                for name in columns.names(where, file, IMAGES)
            }
            pictures, left_out = cameras.choose(where, openers, self._options.cameras)
            found = {
                "state": Joined((columns.numbers(where, file, "observations/state", kinds="f", ranks=(2,)),)),
                "actions": Joined((columns.numbers(where, file, "actions", kinds="f", ranks=(2,)),)),
            }
            final_state, final_pictures = None, {}
            if columns.find(where, file, "final") is not None:
                final_state = Joined((columns.numbers(where, file, "final/state", kinds="f", ranks=(2,)),))
                final_pictures = {key: cameras.stored(where, file, f"final/{key}") for key in pictures}
            default = self._options.default_task
            record = Record(
                found,
                pictures,
                first_text(columns.text(where, "task", file.attrs["task"]), default),
                columns.flag(where, "success", file.attrs.get("success")),
                columns.vector(where, file, "rewards", kinds="f").astype(np.float32),
                columns.vector(where, file, "terminals", kinds="b"),
                tuple((step, first_text(text, default)) for step, text in _task_changes(where, file)),
                left_out=left_out,
                final_state=final_state,
                final_pictures=final_pictures,
            )
        check_task_changes(where, record.task_changes, len(columns.checked(where, record)))
        return record

    def unused(self, index: int) -> list[str]:
        with Reading(self._paths[index]) as file:
            names = columns.names(self.sources[index], file, IMAGES)
            pictures = {f"{place}/{name}" for name in names for place in (IMAGES, "final/images")}
            return cameras.unused(file, pictures | NUMBERS)


def _stated_fps(paths: Sequence[Path]) -> float | None:
    """Return the rate in the metadata of the first readable file; ``acrlpd data convert`` writes it there."""
    for path in paths:
        with contextlib.suppress(ValueError, OSError):  # a damaged file is reported when its episode is read
            return _fps(str(path), read_metadata(path))
    return None


def _fps(where: str, metadata: Mapping[str, Any]) -> float | None:
    fps = metadata.get("fps")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < np.inf):
        raise ValueError(f"{where}: attribute metadata: expected a positive fps, found {fps!r:.100}")
    return None if fps is None else float(fps)


def _fill(file: h5py.File, episode: Episode, metadata: Mapping[str, Any], compression: str | None) -> None:
    file.attrs.update(format=FORMAT, version=VERSION, task=episode.task, metadata=json.dumps(dict(metadata)))
    if episode.success is not None:
        file.attrs["success"] = bool(episode.success)
    file.create_dataset("observations/state", data=episode.state, dtype=np.float32)
    file.create_dataset("actions", data=episode.actions, dtype=np.float32)
    file.create_dataset("rewards", data=episode.rewards, dtype=np.float32)
    file.create_dataset("terminals", data=episode.terminals, dtype=np.bool_)
    for camera, frames in episode.images.items():
        # One frame per chunk, or plain storage: a training sample reads two frames of an episode, not all of them.
        chunks = None if compression is None else (1, *frames.shape[1:])
        file.create_dataset(f"observations/images/{camera}", data=frames, chunks=chunks, compression=compression)
    if episode.final is not None:
        file.create_dataset("final/state", data=episode.final.state[None], dtype=np.float32)
        for camera, frame in episode.final.images.items():
            file.create_dataset(f"final/images/{camera}", data=frame[None], compression=compression)
    if episode.task_changes:
        numbers: dict[str, int] = {}
        file.create_dataset("task_index", data=step_tasks(episode, numbers), dtype=np.int32)
        file.create_dataset("tasks", data=list(numbers), dtype=h5py.string_dtype())


def _task_changes(where: str, file: h5py.File) -> tuple[tuple[int, str], ...]:
    """Read the instructions after the first one as pairs (first step, text); most episodes have none."""
    if columns.find(where, file, "task_index") is None:
        return ()
    indices = columns.vector(where, file, "task_index", kinds="iu")
    texts = [columns.text(where, "tasks", text) for text in columns.dataset(where, file, "tasks")[...].ravel().tolist()]
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(texts):
        raise ValueError(
            f"{where}: task_index: expected numbers of the {len(texts)} texts in tasks, found {indices.min()} to "
            f"{indices.max()}"
        )
    steps = np.flatnonzero(np.diff(indices)) + 1
    return tuple((step, texts[indices[step]]) for step in steps.tolist())


def check_layout(where: str, file: h5py.File) -> None:
    """Raise unless ``file`` holds an episode in the layout described above."""
    found = file.attrs.get("format")
    if not isinstance(found, str) or found != FORMAT:
        raise ValueError(
            f"{where}: expected the attribute format={FORMAT!r} on '/', found {files.one_line(reprlib.repr(found))} "
            f"(keys: {files.listed(sorted(file))}). The file has another layout."
        )
    if not np.array_equal(file.attrs.get("version"), VERSION):
        raise ValueError(
            f"{where}: expected version={VERSION}, found {files.one_line(reprlib.repr(file.attrs.get('version')))}. "
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
    check_task_changes(where, episode.task_changes, length)
    for key, (array, rank) in arrays.items():
        if len(array) != length:
            raise ValueError(f"{where}: {key}: expected {length} rows (as in actions), found {len(array)}")
        columns.check_finite(where, key, np.asarray(array))
        if rank == 4 and (array.shape[-1] != 3 or array.dtype != np.uint8):
            raise ValueError(f"{where}: {key}: expected uint8 (T, h, w, 3), found {array.dtype} {array.shape}")
    finals.rows_of(dataclasses.replace(episode, source=where), finals.seen_rows(episode))
