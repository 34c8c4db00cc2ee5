"""Conversion of DROID (one Franka arm, two of three cameras) from openpi's names and sizes to the model's, and back."""

from __future__ import annotations

import dataclasses

import numpy as np

from acrlpd.data.view.transforms import Data
from acrlpd.pictures import to_rgb

STATE_DIM = ACTION_DIM = 8
CAMERAS = {
    "exterior_image_1_left": ("exterior_image_1_left", "exterior_1_left"),
    "wrist_image_left": ("wrist_image_left", "wrist_left"),
}
"""The robot's name of each camera, with its possible names in data sets."""


@dataclasses.dataclass(frozen=True)
class Droid:
    """The DROID transform: 2 cameras, state 8 (7 joints and the gripper), actions 8.

    The state is ``observation/joint_position`` and ``observation/gripper_position``, which clients of a policy server
    send, or the whole ``observation/state``, which a store holds.
    """

    pi0_fast: bool = False  # pi0-FAST has another order of cameras and masks none

    def __call__(self, data: Data) -> Data:
        base = to_rgb(data["observation/exterior_image_1_left"], "observation/exterior_image_1_left")
        wrist = to_rgb(data["observation/wrist_image_left"], "observation/wrist_image_left")
        missing = np.zeros_like(base)
        seen = np.ones(base.shape[:-3], dtype=bool)
        if self.pi0_fast:
            images = {"base_0_rgb": base, "base_1_rgb": missing, "wrist_0_rgb": wrist}
            masks = dict.fromkeys(images, seen)
        else:
            images = {"base_0_rgb": base, "left_wrist_0_rgb": wrist, "right_wrist_0_rgb": missing}
            masks = {"base_0_rgb": seen, "left_wrist_0_rgb": seen, "right_wrist_0_rgb": ~seen}
        inputs = {"state": _state(data), "image": images, "image_mask": masks}
        return inputs | {key: data[key] for key in ("actions", "prompt") if key in data}

    def inverse(self, data: Data) -> Data:
        return {"actions": np.asarray(data["actions"])[..., :ACTION_DIM]}


def _state(data: Data) -> np.ndarray:
    if "observation/state" in data:
        return np.asarray(data["observation/state"])
    joints = np.asarray(data["observation/joint_position"])
    gripper = np.asarray(data["observation/gripper_position"])
    if gripper.ndim < joints.ndim:  # one number per observation
        gripper = gripper[..., None]
    return np.concatenate([joints, gripper], axis=-1)
