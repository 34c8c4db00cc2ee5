"""DROID's raw episodes are a tree of folders, each with ``trajectory.h5``, ``metadata_<uuid>.json`` and videos.

    <root>/<success|failure>/<date>/<time>/trajectory.h5        numbers, 15 Hz, time first
                                          /recordings/MP4/<serial>.mp4
    <root>/aggregated-annotations-030724.json                   {uuid: {language_instruction1, ...}}

State: 7 joint angles (rad) and the gripper (0 open, 1 closed). Actions: 7 joint velocities (1 is 0.2 rad per step) and
the gripper's target. Step t is frame number t of each video. Cameras have the names of openpi's DROID data set.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acrlpd import files
from acrlpd.data.formats.layouts import cameras, columns
from acrlpd.data.formats.layouts.columns import Joined, Options, Reading, Record
from acrlpd.data.formats.layouts.mp4 import Video
from acrlpd.data.formats.video import VideoReaders
from acrlpd.data.store.episodes import IMAGE_PREFIX, first_text
from acrlpd.data.store.tree import files_below

FILE = "trajectory.h5"
FPS = 15.0
STATE_KEYS = ("joint_positions", "gripper_position")
ACTION_KEYS = ("joint_velocity", "gripper_position")
NUMBERS = ("action/", "observation/robot_state/")  # groups with the keys of the state and the actions
COPY = "action/robot_state/"  # a copy of the state at the time of the action
CLOCK = "observation/timestamp/control/step_start"  # ms
INSTRUCTION = "language_instruction1"
WRIST = "wrist_image_left"
EXTERIOR = "exterior_image_{number}_left"


class Droid:
    """All episodes below a folder, sorted by path. Links to folders are followed; each folder counts once.

    ``state_keys`` lie below ``observation/robot_state``, ``action_keys`` below ``action``. ``drop_idle`` leaves out the
    steps at which the operator was not driving.
    """

    name = "droid"

    def __init__(self, root: Path, options: Options):
        options.check(self.name)
        self._root = root
        self._options = options
        self._folders = _folders(root)
        self._annotations_file = max(root.glob("aggregated-annotations-*.json"), default=None)
        self._annotations = files.read_json(self._annotations_file) if self._annotations_file else {}
        self.sources = [str(folder / FILE) for folder in self._folders]
        self.fps: float | None = options.fps or FPS
        self._videos = VideoReaders()

    def scan(self, index: int) -> Record:
        where, folder, options = self.sources[index], self._folders[index], self._options
        state, actions = self._labels()
        uuid, metadata = _metadata(folder)
        with Reading(folder / FILE) as file:
            cameras.check_keys(where, file, state, "state_keys", asked=options.state_keys is not None, below=NUMBERS)
            cameras.check_keys(
                where, file, actions, "action_keys", asked=options.action_keys is not None, below=NUMBERS
            )
            numbers = {
                "state": Joined(tuple(columns.numbers(where, file, label) for label in state)),
                "actions": Joined(tuple(columns.numbers(where, file, label) for label in actions)),
            }
            columns.checked(where, Record(numbers, {}))
            _check_clock(where, file, len(numbers["state"]))
            serials, others = _cameras(where, file)
            success = _success(where, file, metadata, folder.relative_to(self._root.parent))
            driven = _driven(where, file) if options.drop_idle else None
            label = file.attrs.get("current_task")
            mark = "" if label is None else columns.text(where, "current_task", label)
        videos = folder / "recordings" / "MP4"
        openers = {
            camera: partial(Video.of, videos / f"{serials[camera]}.mp4", camera, self._videos)
            for camera in sorted(serials)
        }
        pictures, left_out = cameras.choose(where, openers, options.cameras)
        record = Record(numbers, pictures, self._task(uuid), success, task_mark=mark, left_out=left_out | others)
        return _picked(where, _ended_with_videos(where, record), driven)

    def unused(self, index: int) -> list[str]:
        state, actions = self._labels()
        with Reading(self._folders[index] / FILE) as file:
            found = cameras.unused(file, {*state, *actions}, NUMBERS)
        return [told for told in found if not told.startswith(COPY)]

    def _labels(self) -> tuple[list[str], list[str]]:
        """Return the keys of the state and of the actions."""
        state = [f"observation/robot_state/{key}" for key in self._options.state_keys or STATE_KEYS]
        return state, [f"action/{key}" for key in self._options.action_keys or ACTION_KEYS]

    def _task(self, uuid: str) -> str:
        entry = self._annotations.get(uuid, {})
        text = entry.get(INSTRUCTION, "") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or not isinstance(text, str | None):
            raise ValueError(
                f"{self._annotations_file}: {uuid}: expected an object with a text {INSTRUCTION}, found {text!r:.100}"
            )
        return first_text(text or "", self._options.default_task)


def trajectories(root: Path) -> Iterator[Path]:
    """Yield every ``trajectory.h5`` below a folder, also behind links; a folder with two paths to it comes twice."""
    return (root / place[1:] for place, _ in files_below(root) if place.endswith(f"/{FILE}"))


def _folders(root: Path) -> list[Path]:
    """Return each folder under one path: its own place below ``root`` if it lies there, else the first link to it."""
    real_root = root.resolve()
    places = {path.parent: path.parent.resolve() for path in sorted(trajectories(root))}
    direct = {folder for folder, place in places.items() if place == real_root / folder.relative_to(root)}
    by_place: dict[Path, Path] = {}
    for folder in sorted(places, key=lambda folder: folder not in direct):
        by_place.setdefault(places[folder], folder)
    return sorted(by_place.values())


def _metadata(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the episode's uuid and the content of its JSON file; both are empty if there is none."""
    found = sorted(folder.glob("metadata_*.json"))
    return (found[0].stem.removeprefix("metadata_"), files.read_json(found[0])) if found else ("", {})


def _check_clock(where: str, file: h5py.File, steps: int) -> None:
    """Check that the start times of the steps ascend, if the file has them. Durations of steps may vary."""
    if columns.find(where, file, CLOCK) is None:
        return
    times = columns.vector(where, file, CLOCK)
    columns.check_lengths(where, {"state": steps, CLOCK: len(times)})
    late = np.flatnonzero(times[1:] <= times[:-1])
    if len(late):
        row = int(late[0])
        raise ValueError(
            f"{where}: {CLOCK}: expected times that ascend, found {times[row]} ms in row {row} and {times[row + 1]} ms "
            f"in row {row + 1}. Steps are missing, or out of order."
        )


def _cameras(where: str, file: h5py.File) -> tuple[dict[str, str], dict[str, str]]:
    """Return the serial number of each camera: type 0 is the wrist, the others are exterior, in ascending order.

    The second dictionary has the reason for each camera without a name: it is a second one on the wrist.
    """
    group = "observation/camera_type"
    if not isinstance(columns.find(where, file, group), h5py.Group):
        raise ValueError(f"{where}: {group}: expected the type of each camera, found nothing")
    types = {serial: columns.vector(where, file, f"{group}/{serial}") for serial in columns.names(where, file, group)}
    wrist = [serial for serial, kinds in types.items() if (kinds == 0).all()]
    exterior = sorted((serial for serial in types if serial not in wrist), key=_serial_order)
    named = {EXTERIOR.format(number=number): serial for number, serial in enumerate(exterior, 1)}
    others = {IMAGE_PREFIX + serial: f"a second camera on the wrist, beside {wrist[0]}" for serial in wrist[1:]}
    return named | ({WRIST: wrist[0]} if wrist else {}), others


def _serial_order(serial: str) -> tuple[int, str]:
    return (int(serial) if serial.isdigit() else 0, serial)


def _success(where: str, file: h5py.File, metadata: Mapping[str, Any], place: Path) -> bool | None:
    """Return the success from the first source that has it: attribute, JSON, controller, name of a folder."""
    for source in (file.attrs, metadata):
        if (found := columns.flag(where, "success", source.get("success"))) is not None:
            return found
    label = "observation/controller_info/success"
    if columns.find(where, file, label) is not None and len(recorded := columns.vector(where, file, label)):
        return bool(recorded[-1])
    named = {"success": True, "failure": False}
    return next((named[part] for part in reversed(place.parts) if part in named), None)


def _driven(where: str, file: h5py.File) -> np.ndarray:
    """Return the numbers of the steps at which the operator was driving."""
    return np.flatnonzero(columns.vector(where, file, "observation/controller_info/movement_enabled"))


def _ended_with_videos(where: str, record: Record) -> Record:
    """End the episode where its shortest video ends, and cut longer videos to the length of the episode."""
    steps = len(record)
    lengths = {"": steps} | {key: len(each) for key, each in record.pictures.items()}
    shortest = min(lengths, key=lengths.__getitem__)
    kept = lengths[shortest]
    if kept < steps:
        warnings.warn(
            f"{where}: {shortest}: the video has {kept} frames for {steps} steps; the episode ends there", stacklevel=2
        )
    return _picked(where, record, np.arange(kept))


def _picked(where: str, record: Record, steps: np.ndarray | None) -> Record:
    """Return the record with only these steps; None keeps all of them."""
    if steps is None:
        return record
    steps = steps[steps < len(record)]
    lengths = {*map(len, record.numbers.values()), *map(len, record.pictures.values())}  # videos may be longer
    if all(np.array_equal(steps, np.arange(length)) for length in lengths):
        return record
    if not len(steps):
        raise ValueError(f"{where}: no step is left: the operator was driving at none of them")
    return dataclasses.replace(
        record,
        numbers={key: each.pick(steps) for key, each in record.numbers.items()},
        pictures={key: each.pick(steps) for key, each in record.pictures.items()},
    )
