"""ALOHA's and ACT's layout: one HDF5 file per episode (``episode_0.hdf5``), without rate, text, reward or success.

    /observations/qpos, qvel, effort   (T, 14)         measured on the follower arms
    /observations/images/<camera>      (T, h, w, 3)    raw RGB, or a JPEG per row: (T, bytes) padded with zeros, or (T,)
                                                       byte strings of fixed or variable length
    /action                            (T, 14)         joint targets from the leader arms, for the row's observation

The 14 numbers are 6 joint angles (rad) and the gripper (0 closed, 1 open) of the left arm, then of the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from acrlpd.data.formats.layouts import cameras, columns
from acrlpd.data.formats.layouts.columns import Joined, Options, Reading, Record

IMAGES = "observations/images"
STATE_KEYS = ("qpos",)
ACTION_KEYS = ("action",)


class Aloha:
    """Episodes of one robot or simulation. ``state_keys`` lie below ``/observations``, ``action_keys`` below ``/``."""

    name = "aloha"

    def __init__(self, paths: Sequence[Path], options: Options):
        options.check(self.name)
        self._options = options
        self._paths = paths
        self.sources = [str(path) for path in paths]
        self.fps = options.fps

    def scan(self, index: int) -> Record:
        where, options = self.sources[index], self._options
        state, actions = self._labels()
        with Reading(self._paths[index]) as file:
            cameras.check_keys(where, file, state, "state_keys", asked=options.state_keys is not None)
            cameras.check_keys(where, file, actions, "action_keys", asked=options.action_keys is not None)
            found = {
                "state": Joined(tuple(columns.numbers(where, file, label) for label in state)),
                "actions": Joined(tuple(columns.numbers(where, file, label) for label in actions)),
            }
            openers = {
                name: partial(cameras.stored, where, file, f"{IMAGES}/{name}", bgr=options.jpeg_bgr)
                for name in columns.names(where, file, IMAGES)
            }
            pictures, left_out = cameras.choose(where, openers, options.cameras)
        return columns.checked(where, Record(found, pictures, options.default_task, left_out=left_out))

    def unused(self, index: int) -> list[str]:
        state, actions = self._labels()
        with Reading(self._paths[index]) as file:
            images = [f"{IMAGES}/{name}" for name in columns.names(self.sources[index], file, IMAGES)]
            return cameras.unused(file, {*state, *actions, *images, "compress_len"})

    def _labels(self) -> tuple[list[str], list[str]]:
        """Return the keys of the state and of the actions."""
        options = self._options
        state = [f"observations/{key}" for key in options.state_keys or STATE_KEYS]
        return state, list(options.action_keys or ACTION_KEYS)
