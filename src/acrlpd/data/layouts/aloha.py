"""ALOHA and ACT: one HDF5 file an episode (``episode_0.hdf5``), without rate, text, reward or success.

    /observations/qpos, qvel, effort   (T, 14)         what the followers measured
    /observations/images/<camera>      (T, h, w, 3)    raw RGB, or (T, bytes): one JPEG a row, padded with zeros
    /action                            (T, 14)         the leaders' joint targets, taken at the observation of their row

14 numbers are 6 joint angles (rad) and the gripper (0 closed, 1 open) of the left arm, then of the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py

from acrlpd.data.episodes import IMAGE_PREFIX
from acrlpd.data.layouts import columns
from acrlpd.data.layouts.columns import Column, Joined, Jpegs, Options, Pictures, Reading, Record, Rows

STATE_KEYS = ("qpos",)
ACTION_KEYS = ("action",)


class Aloha:
    """Episodes of one robot or simulation. ``state_keys`` are below ``/observations``, ``action_keys`` below ``/``."""

    name = "aloha"

    def __init__(self, paths: Sequence[Path], options: Options):
        options.check(self.name)
        self._options = options
        self._paths = paths
        self.sources = [str(path) for path in paths]
        self.fps = options.fps

    def scan(self, index: int) -> Record:
        where, options = self.sources[index], self._options
        state = [f"observations/{key}" for key in options.state_keys or STATE_KEYS]
        with Reading(self._paths[index]) as file:
            found: dict[str, Column] = {
                "state": Joined(tuple(columns.numbers(where, file, label) for label in state)),
                "actions": Joined(
                    tuple(columns.numbers(where, file, label) for label in options.action_keys or ACTION_KEYS)
                ),
            }
            # Names containing "depth" are not colour pictures.
            cameras = [name for name in columns.names(where, file, "observations/images") if "depth" not in name]
            pictures = {
                IMAGE_PREFIX + camera: _pictures(where, file, f"observations/images/{camera}")
                for camera in columns.choose_cameras(where, cameras, options.cameras)
            }
        columns.checked(where, Record(found | pictures))  # before a picture's size is asked for: there may be none
        for key, column in pictures.items():
            found[key] = Jpegs.of(column, bgr=options.jpeg_bgr) if isinstance(column, Rows) else column
        return Record(found, options.default_task)


def _pictures(where: str, file: h5py.File, label: str) -> Pictures | Rows:
    """The rank decides: an attribute that says so exists in newer files alone."""
    data = columns.dataset(where, file, label)
    if data.ndim == 2:
        return Rows.of(where, data, label, kinds="u", ranks=(2,))
    return columns.raw_pictures(where, file, label)
