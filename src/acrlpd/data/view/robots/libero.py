"""Conversion of LIBERO (one simulated Panda arm) from openpi's names and sizes to the model's, and back."""

from __future__ import annotations

import dataclasses

import numpy as np

from acrlpd.data.view.transforms import Data
from acrlpd.pictures import to_rgb

STATE_DIM, ACTION_DIM = 8, 7
CAMERAS = {
    "image": ("image", "agentview_rgb"),
    "wrist_image": ("wrist_image", "image2", "eye_in_hand_rgb"),
}
"""The robot's name of each camera, with its names in openpi's data set, in LeRobot's and in the demonstrations."""


@dataclasses.dataclass(frozen=True)
class Libero:
    """The LIBERO transform: 2 cameras, state 8, actions 7. Keys contain slashes: the dictionary is flat."""

    pi0_fast: bool = False  # pi0-FAST does not mask the missing camera

    def __call__(self, data: Data) -> Data:
        base = to_rgb(data["observation/image"], "observation/image")
        seen = np.ones(base.shape[:-3], dtype=bool)
        inputs = {
            "state": np.asarray(data["observation/state"]),
            "image": {
                "base_0_rgb": base,
                "left_wrist_0_rgb": to_rgb(data["observation/wrist_image"], "observation/wrist_image"),
                "right_wrist_0_rgb": np.zeros_like(base),
            },
            "image_mask": {
                "base_0_rgb": seen,
                "left_wrist_0_rgb": seen,
                "right_wrist_0_rgb": seen & self.pi0_fast,
            },
        }
        return inputs | {key: data[key] for key in ("actions", "prompt") if key in data}

    def inverse(self, data: Data) -> Data:
        return {"actions": np.asarray(data["actions"])[..., :ACTION_DIM]}
