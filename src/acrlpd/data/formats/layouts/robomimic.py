"""robomimic's layout, one HDF5 file per data set. LIBERO's demonstrations have the same layout with other names.

    /data                attributes: total, env_args (JSON)
    /data/demo_<i>       attributes: num_samples, ep_meta (JSON, newer files)
        actions (N, a)   rewards (N,)   obs/<key> (N, ...)   next_obs/<key> (N, ...), in some files
    /mask/<filter key>   names of demos

The last row of ``next_obs`` is the final observation of the demo; the others repeat ``obs``.

``dones`` marks neither the end of an episode nor success (it depends on how the file was made) and is not read.

LIBERO stores its pictures upside down and mirrored; they are turned here. Its recorder stored each observation *after*
the action of its row. Rows are read as they are stored, unless ``align_observations`` pairs every action with the
observation before it; this drops the first action and makes the last observation the final one.

LIBERO names a file after its task, ``KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5``. The name gives the instruction if
the file holds none, as in filtered copies.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acrlpd import files
from acrlpd.data.formats.layouts import cameras, columns
from acrlpd.data.formats.layouts.columns import Joined, Numbers, Options, Pictures, Reading, Record
from acrlpd.data.store.episodes import IMAGE_PREFIX, first_text

ARM = r"(robot(\d+)(_right|_left)?)_eef_pos"  # every arm has this key; robosuite's two-armed robots add the side
ARM_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")  # the state has these keys of every arm
LIBERO_STATE_KEYS = ("ee_pos", "ee_ori", "gripper_states")
ACTION_KEYS = ("actions",)
BOOKKEEPING = ("rewards", "dones", "states")  # keys of a demo that no policy reads


class Robomimic:
    """The demos of one or several files, sorted by file and number. ``state_keys`` lie below ``obs`` or the demo.

    By default the state is the one pi0 uses, over all arms: ``ARM_KEYS``, with the quaternion as a rotation vector.
    Keys named by the user are read as they are stored. ``<key>_image`` and ``<key>_rgb`` below ``obs`` are cameras, and
    so is every key that the user names as one.
    """

    def __init__(self, paths: Sequence[Path], options: Options):
        self._options = options
        self._demos: list[tuple[Path, str]] = []
        self._tasks: dict[Path, str] = {}
        self._marks: dict[Path, str] = {}  # text that distinguishes a file's task from the others
        self._flips: dict[Path, tuple[int, ...]] = {}
        self.fps = options.fps
        self._faults: dict[Path, str] = {}  # errors of unreadable files; each such file stands for one episode
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
        convert = options.state_keys is None
        with Reading(path) as file:
            demo = columns.group(where, file, f"data/{name}")
            state, actions = self._labels(where, demo)
            cameras.check_keys(where, demo, state, "state_keys", asked=not convert)
            cameras.check_keys(where, demo, actions, "action_keys", asked=options.action_keys is not None)
            found = {
                "state": Joined(tuple(_state(where, demo, label, convert=convert) for label in state)),
                "actions": Joined(tuple(columns.numbers(where, demo, label) for label in actions)),
            }
            openers = {
                camera: partial(cameras.stored, where, demo, label, flip=self._flips[path])
                for camera, label in self._cameras(where, demo).items()
            }
            pictures, left_out = cameras.choose(where, openers, options.cameras)
            final_state, final_pictures = self._final(where, demo, index, state, list(pictures))
            meta = columns.json_text(where, "ep_meta", demo.attrs.get("ep_meta"))
            record = Record(
                found,
                pictures,
                first_text(str(meta.get("lang") or ""), self._tasks[path], options.default_task),
                task_mark=self._marks[path],
                rewards=_rewards(where, demo),
                left_out=left_out,
                final_state=final_state,
                final_pictures=final_pictures,
            )
            _check_num_samples(where, demo, len(columns.checked(where, record)))
        return _aligned(where, record) if options.align_observations else record

    def _final(
        self, where: str, demo: h5py.Group, index: int, state: Sequence[str], pictures: Sequence[str]
    ) -> tuple[Joined | None, dict[str, Pictures]]:
        """Return the observation after the last action, if ``next_obs`` has all keys of the observations."""
        known = self._cameras(where, demo)
        labels = {key: known[key.removeprefix(IMAGE_PREFIX)] for key in pictures}
        wanted = [*state, *labels.values()]
        if any(columns.find(where, demo, _next(label)) is None for label in wanted):
            return None, {}
        convert, flip = self._options.state_keys is None, self._flips[self._demos[index][0]]
        after = Joined(tuple(_state(where, demo, _next(label), convert=convert) for label in state))
        seen = {key: cameras.stored(where, demo, _next(label), flip=flip) for key, label in labels.items()}
        steps = len(columns.dataset(where, demo, self._labels(where, demo)[1][0]))
        last = {key: columns.last_row(where, each, steps) for key, each in seen.items()}
        return columns.last_row(where, after, steps), last

    def unused(self, index: int) -> list[str]:
        where, (path, name) = self.sources[index], self._demos[index]
        with Reading(path) as file:
            demo = file[f"data/{name}"]
            state, actions = self._labels(where, demo)
            known = {*state, *actions, *self._cameras(where, demo).values(), *BOOKKEEPING}
            return [told for told in cameras.unused(demo, known) if not told.startswith("next_obs/")]

    def _labels(self, where: str, demo: h5py.Group) -> tuple[list[str], list[str]]:
        """Return the keys of the state and of the actions, below the demo."""
        options, there = self._options, columns.names(where, demo, "obs")
        if options.state_keys is not None:
            state = [_label(demo, key) for key in options.state_keys]
        elif self._libero:
            state = [f"obs/{key}" for key in LIBERO_STATE_KEYS]
        else:
            state = [f"obs/{arm}_{key}" for arm in _arms(there) for key in ARM_KEYS]
        return state, list(options.action_keys or ACTION_KEYS)

    def _cameras(self, where: str, demo: h5py.Group) -> dict[str, str]:
        """Return the key of each camera: ``<camera>_image``, in LIBERO ``<camera>_rgb``, and keys named by the user."""
        usual = [key for key in columns.names(where, demo, "obs") if key.endswith(("_image", "_rgb"))]
        named = {key: _label(demo, key) for key in self._options.cameras or ()}
        return {key: f"obs/{key}" for key in usual} | {key: label for key, label in named.items() if label in demo}

    def _add_files(self, paths: Sequence[Path]) -> set[bool]:
        """Add every file. An unreadable one counts as one bad episode, which is reported or skipped when scanned."""
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
        """Note the file's demos and task text; return whether the file is LIBERO's."""
        where = str(path)
        with Reading(path) as file:
            demos = _demo_names(where, file, self._options.filter_key)
            data = columns.group(where, file, "data")
            attributes = data.attrs
            _check_total(where, data)
            problem = columns.json_text(where, "problem_info", attributes.get("problem_info"))
            environment, arguments = _environment(where, attributes)
            libero = bool(problem) or any(
                columns.find(where, file, f"data/{demo}/obs/agentview_rgb") is not None for demo in demos
            )
            convention = attributes.get("macros_image_convention", "opengl")
            # pi0 was trained on mirrored pictures; in OpenGL's convention the rows are upside down as well.
            upside_down = columns.text(where, "macros_image_convention", convention) == "opengl"
            self.fps = self.fps or _control_rate(where, arguments)
        self._demos += [(path, demo) for demo in demos]
        stated = str(problem.get("language_instruction") or arguments.get("env_lang") or "")
        self._tasks[path] = first_text(stated, _task_in_name(path) if libero else "")
        # robomimic has one task per environment, LIBERO one task per file
        self._marks[path] = path.name if libero or not environment else f"environment {environment}"
        self._flips[path] = ((0, 1) if upside_down else (1,)) if libero else ()
        return libero


def _demo_names(where: str, file: h5py.File, filter_key: str | None) -> list[str]:
    """Return the demos, or those of the filter key, sorted by number: text order would put demo_10 before demo_2."""
    stored = [name for name in columns.names(where, file, "data") if re.fullmatch(r"demo_\d+", name)]
    if filter_key is not None:
        if not isinstance(columns.find(where, file, f"mask/{filter_key}"), h5py.Dataset):
            known = files.listed(columns.names(where, file, "mask")) or "none"
            raise ValueError(f"{where}: mask/{filter_key}: no such filter key; the file has {known}")
        mask = columns.dataset(where, file, f"mask/{filter_key}")
        if mask.ndim != 1:
            raise ValueError(f"{where}: mask/{filter_key}: expected a list of names, found the shape {mask.shape}")
        names = [columns.text(where, f"mask/{filter_key}", name) for name in mask[...].tolist()]
        unknown = sorted(set(names) - set(stored))
        if unknown:
            raise ValueError(
                f"{where}: mask/{filter_key}: the filter key names {files.listed(unknown)}, which /data does not have. "
                "Repair the mask, or leave out filter_key."
            )
        stored = sorted(set(names))
    if not stored:
        raise ValueError(f"{where}: expected demos (data/demo_0, ...), found none")
    return sorted(stored, key=lambda name: int(name.removeprefix("demo_")))


def _task_in_name(path: Path) -> str:
    """Return the task text in the name of a LIBERO file; empty if the name has another form."""
    found = re.fullmatch(
        r"(?P<scene>[A-Z_]+_SCENE\d+_)?(?P<words>[A-Za-z0-9]+(_[A-Za-z0-9]+)+?)(?P<end>_demo)?", path.stem
    )
    return found["words"].replace("_", " ") if found and (found["scene"] or found["end"]) else ""


def _next(label: str) -> str:
    """Return the key of the same observation one step later."""
    return f"next_obs/{label.removeprefix('obs/')}"


def _rewards(where: str, demo: h5py.Group) -> np.ndarray | None:
    if columns.find(where, demo, "rewards") is None:
        return None
    return columns.vector(where, demo, "rewards").astype(np.float32)


def _state(where: str, demo: h5py.Group, label: str, *, convert: bool) -> Numbers:
    rows = columns.numbers(where, demo, label)
    is_quaternion = label.endswith("_quat") and rows.shape[1:] == (4,)
    return rows.converted(columns.axis_angle) if convert and is_quaternion else rows


def _arms(there: Sequence[str]) -> list[str]:
    """Return the arms that have keys, sorted by number, the right one first; robot0 if none has any."""
    found = [arm for key in there if (arm := re.fullmatch(ARM, key))]
    found.sort(key=lambda arm: (int(arm[2]), arm[3] != "_right"))
    return [arm[1] for arm in found] or ["robot0"]


def _label(demo: h5py.Group, key: str) -> str:
    """Return the path of a key that the user named: below ``obs`` if it is there, else directly below the demo."""
    return key if f"obs/{key}" not in demo and key in demo else f"obs/{key}"


def _check_num_samples(where: str, demo: h5py.Group, stored: int) -> None:
    stated = demo.attrs.get("num_samples", stored)
    if not np.array_equal(stated, stored):
        told = f"{files.one_line(stated):.100}"
        raise ValueError(f"{where}: attribute num_samples: it says {told} steps, but {stored} are stored")


def _check_total(where: str, data: h5py.Group) -> None:
    """Only warn: copies from which demos were removed keep the old total, and the reader does not use it."""
    total = data.attrs.get("total")
    stated = [demo.attrs.get("num_samples", 0) for demo in _groups(where, data)]
    counted = sum(steps for steps in stated if isinstance(steps, int | np.number))  # others fail with their demo
    if total is not None and not np.array_equal(total, counted):
        told = f"{files.one_line(total):.100}"
        warnings.warn(f"{where}: attribute total of /data: {told} steps, but its demos have {counted}", stacklevel=2)


def _groups(where: str, data: h5py.Group) -> list[h5py.Group]:
    found = [columns.find(where, data, name) for name in data]
    return [each for each in found if isinstance(each, h5py.Group)]


def _environment(where: str, attributes: h5py.AttributeManager) -> tuple[str, dict[str, Any]]:
    """Read the name and the arguments of the environment, which hold the task text and the control rate."""
    stated = columns.json_text(where, "env_args", attributes.get("env_args"))
    arguments = stated.get("env_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: attribute env_args: expected an object env_kwargs, found {arguments!r:.100}")
    return str(stated.get("env_name") or ""), arguments


def _control_rate(where: str, arguments: dict[str, Any]) -> float | None:
    rate = arguments.get("control_freq")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < np.inf):
        raise ValueError(f"{where}: attribute env_args: expected a positive control_freq, found {rate!r:.100}")
    return None if rate is None else float(rate)


def _aligned(where: str, record: Record) -> Record:
    """Pair the observation of stored row t, the result of action t, with the action of row t + 1."""
    steps = len(record)
    if steps < 2:
        raise ValueError(f"{where}: align_observations needs at least 2 steps, found {steps}")
    before, after = np.arange(steps - 1), np.arange(1, steps)
    state, actions = record.numbers["state"], record.numbers["actions"]
    return dataclasses.replace(
        record,
        numbers={"state": state.pick(before), "actions": actions.pick(after)},
        pictures={key: each.pick(before) for key, each in record.pictures.items()},
        rewards=None if record.rewards is None else record.rewards[1:],
        final_state=state.pick(after[-1:]),
        final_pictures={key: each.pick(after[-1:]) for key, each in record.pictures.items()},
    )
