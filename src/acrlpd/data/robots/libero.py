"""LIBERO (one Panda arm in simulation): openpi's names and sizes to the model's, and back."""

from __future__ import annotations

import dataclasses

import numpy as np

from acrlpd.data.transforms import Data, Repack, to_image

ACTION_DIM = 7
REPACK = Repack(
    {
        "observation/state": "state",
        "observation/image": "image/image",
        "observation/wrist_image": "image/wrist_image",
        "actions": "actions",
        "prompt": "prompt",
    }
)
"""From a store whose cameras are called ``image`` and ``wrist_image``, as in openpi's LIBERO data set."""


@dataclasses.dataclass(frozen=True)
class Libero:
    """Two cameras and a state of 8 in; 7 action dimensions out. The keys contain slashes: the dictionary is flat."""

    pi0_fast: bool = False  # pi0-FAST does not mask the camera that is missing

    def __call__(self, data: Data) -> Data:
        base = to_image(np.asarray(data["observation/image"]))
        seen = np.ones(base.shape[:-3], dtype=bool)
        inputs = {
            "state": np.asarray(data["observation/state"]),
            "image": {
                "base_0_rgb": base,
                "left_wrist_0_rgb": to_image(np.asarray(data["observation/wrist_image"])),
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
