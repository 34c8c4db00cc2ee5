"""robomimic, one HDF5 file a data set, and LIBERO's demonstrations, which share its layout with other names.

    /data                attributes: total, env_args (JSON)
    /data/demo_<i>       attributes: num_samples, ep_meta (JSON, newer files)
        actions (N, a)   rewards (N,)   obs/<key> (N, ...)
    /mask/<filter key>   names of demos

``dones`` tells neither the end of an episode nor success (it depends on how the file was made) and is not read.

LIBERO stores its pictures upside down and mirrored; they are turned here. Its recorder stored each observation *after*
the action of its row. Rows are read as they are stored, unless ``align_observations`` pairs every action with the
observation before it, which leaves out the first action.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acrlpd.data.episodes import IMAGE_PREFIX
from acrlpd.data.layouts import columns
from acrlpd.data.layouts.columns import Column, Converted, Joined, Options, Picked, Reading, Record

STATE_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
LIBERO_STATE_KEYS = ("ee_pos", "ee_ori", "gripper_states")
ACTION_KEYS = ("actions",)


class Robomimic:
    """The demos of one or several files, by file and number. ``state_keys`` are below ``obs``.

    Without them, the state is pi0's: the quaternion of ``STATE_KEYS`` becomes a rotation vector. Keys that are named
    are read as they are stored.
    """

    def __init__(self, paths: Sequence[Path], options: Options):
        self._options = options
        self._demos: list[tuple[Path, str]] = []
        self._tasks: dict[Path, str] = {}
        self._flips: dict[Path, tuple[int, ...]] = {}
        self.fps = options.fps
        self._faults: dict[Path, str] = {}  # of files that cannot be read; each stands for one episode
        libero = self._add_files(paths)
        if len(libero) > 1:
            raise ValueError(f"{paths[0].parent}: expected files of one kind, found robomimic's and LIBERO's")
        (self._libero,) = libero
        self.name = "libero" if self._libero else "robomimic"
        options.check(self.name)
        self.sources = [f"{path}: data/{demo}" if demo else str(path) for path, demo in self._demos]

    def scan(self, index: int) -> Record:
        where, options = self.sources[index], self._options
        path, name = self._demos[index]
        if path in self._faults:
            raise ValueError(self._faults[path])
        state_keys = options.state_keys or (LIBERO_STATE_KEYS if self._libero else STATE_KEYS)
        convert = options.state_keys is None
        with Reading(path) as file:
            demo = columns.group(where, file, f"data/{name}")
            found: dict[str, Column] = {
                "state": Joined(tuple(_state(where, demo, f"obs/{key}", convert=convert) for key in state_keys)),
                "actions": Joined(
                    tuple(columns.numbers(where, demo, label) for label in options.action_keys or ACTION_KEYS)
                ),
            }
            for camera in columns.choose_cameras(where, _cameras(where, demo), options.cameras):
                found[IMAGE_PREFIX + camera] = columns.raw_pictures(
                    where, demo, f"obs/{camera}", flip=self._flips[path]
                )
            meta = columns.json_text(where, "ep_meta", demo.attrs.get("ep_meta"))
            record = Record(
                found,
                str(meta.get("lang") or self._tasks[path] or options.default_task),
                rewards=columns.vector(where, demo, "rewards").astype(np.float32) if "rewards" in demo else None,
            )
            _check_num_samples(where, demo, len(columns.checked(where, record)))
        return _aligned(where, record) if options.align_observations else record

    def _add_files(self, paths: Sequence[Path]) -> set[bool]:
        """As ``_add_file``. A file that cannot be read is told, or left out, when its turn comes."""
        libero = set()
        for path in paths:
            try:
                libero.add(self._add_file(path))
            except (ValueError, OSError) as error:
                self._demos.append((path, ""))
                self._faults[path] = str(error)
        if not libero:
            raise ValueError(self._faults[paths[0]])
        return libero

    def _add_file(self, path: Path) -> bool:
        """Notes the file's demos and text; returns whether it is LIBERO's."""
        where = str(path)
        with Reading(path) as file:
            demos = _demo_names(where, file, self._options.filter_key)
            attributes = file["data"].attrs
            _check_total(where, file["data"])
            problem = columns.json_text(where, "problem_info", attributes.get("problem_info"))
            arguments = _environment(where, attributes)
            libero = bool(problem) or any(f"data/{demo}/obs/agentview_rgb" in file for demo in demos)
            convention = attributes.get("macros_image_convention", "opengl")
            # pi0's pictures are mirrored; OpenGL's have the rows upside down as well.
            upside_down = columns.text(where, "macros_image_convention", convention) == "opengl"
            self.fps = self.fps or _control_rate(where, arguments)
        self._demos += [(path, demo) for demo in demos]
        self._tasks[path] = str(problem.get("language_instruction") or arguments.get("env_lang") or "")
        self._flips[path] = ((0, 1) if upside_down else (1,)) if libero else ()
        return libero


def _demo_names(where: str, file: h5py.File, filter_key: str | None) -> list[str]:
    """The demos, or those that the filter key names, by number: text order puts demo_10 before demo_2."""
    stored = [name for name in columns.group(where, file, "data") if re.fullmatch(r"demo_\d+", name)]
    if filter_key is not None:
        mask = file.get(f"mask/{filter_key}")
        if not isinstance(mask, h5py.Dataset):
            known = ", ".join(columns.names(where, file, "mask")) or "none"
            raise ValueError(f"{where}: mask/{filter_key}: no such filter key; the file has {known}")
        if mask.ndim != 1:
            raise ValueError(f"{where}: mask/{filter_key}: expected a list of names, found the shape {mask.shape}")
        names = [columns.text(where, f"mask/{filter_key}", name) for name in mask[...].tolist()]
        unknown = sorted(set(names) - set(stored))
        if unknown:
            raise ValueError(
                f"{where}: mask/{filter_key}: the filter key names {', '.join(unknown)}, which /data does not have. "
                "Repair the mask, or leave out filter_key."
            )
        stored = sorted(set(names))
    if not stored:
        raise ValueError(f"{where}: expected demos (data/demo_0, ...), found none")
    return sorted(stored, key=lambda name: int(name.removeprefix("demo_")))


def _state(where: str, demo: h5py.Group, label: str, *, convert: bool) -> Column:
    rows = columns.numbers(where, demo, label)
    is_quaternion = label.endswith("_quat") and rows.row_shape == (4,)
    return Converted(rows, columns.axis_angle, (3,)) if convert and is_quaternion else rows


def _cameras(where: str, demo: h5py.Group) -> list[str]:
    """Keys that hold colour pictures: ``<camera>_image``, in LIBERO ``<camera>_rgb``."""
    return [key for key in columns.names(where, demo, "obs") if key.endswith(("_image", "_rgb"))]


def _check_num_samples(where: str, demo: h5py.Group, stored: int) -> None:
    stated = demo.attrs.get("num_samples", stored)
    if not np.array_equal(stated, stored):
        raise ValueError(f"{where}: attribute num_samples: it says {stated} steps, but {stored} are stored")


def _check_total(where: str, data: h5py.Group) -> None:
    """A warning only: copies with some demos taken out keep the old number, and nothing is read by it."""
    total = data.attrs.get("total")
    stated = [demo.attrs.get("num_samples", 0) for demo in map(data.get, data) if isinstance(demo, h5py.Group)]
    counted = sum(steps for steps in stated if isinstance(steps, int | np.number))  # others: told with their demo
    if total is not None and not np.array_equal(total, counted):
        warnings.warn(f"{where}: attribute total of /data: {total} steps, but its demos have {counted}", stacklevel=2)


def _environment(where: str, attributes: h5py.AttributeManager) -> dict[str, Any]:
    """The arguments of the environment, of which its text and rate are used."""
    arguments = columns.json_text(where, "env_args", attributes.get("env_args")).get("env_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: attribute env_args: expected an object env_kwargs, found {arguments!r}")
    return arguments


def _control_rate(where: str, arguments: dict[str, Any]) -> float | None:
    rate = arguments.get("control_freq")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < np.inf):
        raise ValueError(f"{where}: attribute env_args: expected a positive control_freq, found {rate!r}")
    return None if rate is None else float(rate)


def _aligned(where: str, record: Record) -> Record:
    """Row t is the observation of stored row t (the result of action t) with the action of row t + 1."""
    steps = len(record)
    if steps < 2:
        raise ValueError(f"{where}: align_observations needs at least 2 steps, found {steps}")
    before, after = np.arange(steps - 1), np.arange(1, steps)
    shifted = {key: Picked(column, after if key == "actions" else before) for key, column in record.columns.items()}
    rewards = None if record.rewards is None else record.rewards[1:]
    return Record(dict(shifted), record.task, record.success, rewards)
