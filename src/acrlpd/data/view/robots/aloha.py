"""Conversion of ALOHA (two ViperX arms) between openpi's names and conventions and those of pi0's training.

An arm has 6 joint angles (rad) and a gripper; the 14 numbers are the left arm, then the right one. The constants below
are openpi's for the Trossen arms. State and actions intentionally use different gripper maps: the state holds the
position of the follower's finger, the action that of the leader's handle.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from acrlpd.data.view.transforms import Data, make_bool_mask
from acrlpd.pictures import to_rgb
from acrlpd.types import typed

STATE_DIM = ACTION_DIM = 14
DELTA_MASK = make_bool_mask(6, -1, 6, -1)  # joints relative, grippers absolute
CAMERAS = {
    "cam_high": ("cam_high", "top"),  # "top" in simulation
    "cam_left_wrist": ("cam_left_wrist", "left_wrist"),
    "cam_right_wrist": ("cam_right_wrist", "right_wrist"),
}
"""The robot's name of each camera, with its possible names in data sets."""

_SLOTS = {"base_0_rgb": "cam_high", "left_wrist_0_rgb": "cam_left_wrist", "right_wrist_0_rgb": "cam_right_wrist"}
_UNUSED = ("cam_low",)
_GRIPPERS = np.array([6, 13])
_SIGNS = np.array([1.0, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1])  # joint directions of pi0

_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.05800  # finger position, m
_HORN, _ARM = 0.022, 0.036  # the linkage from motor to finger, m
_PI0_CLOSED, _PI0_OPEN = 0.5476, 1.6296  # gripper angle of 0 and 1 in pi0, rad
_LEADER_CLOSED, _LEADER_OPEN = -0.6213, 1.4910  # gripper angle of 0 and 1 in ALOHA's actions, rad


@dataclasses.dataclass(frozen=True)
class Aloha:
    """The ALOHA transform: up to 4 cameras, state 14, actions 14. Missing wrist cameras are black and masked out."""

    adapt_to_pi: bool = True  # use pi0's joint signs and gripper angles; off for models trained on ALOHA's own numbers

    def __call__(self, data: Data) -> Data:
        given = data["images"]
        unknown = given.keys() - set(_SLOTS.values()) - set(_UNUSED)
        if unknown or "cam_high" not in given:
            raise ValueError(
                f"ALOHA cameras are {', '.join([*_SLOTS.values(), *_UNUSED])}, of which cam_high must be there; "
                f"got {', '.join(sorted(given))}. Rename them in the data, or in the client."
            )
        base = to_rgb(given["cam_high"], "images/cam_high")
        seen = np.ones(base.shape[:-3], dtype=bool)
        state = np.asarray(data["state"])
        inputs: dict[str, Any] = {
            "state": state_to_pi0(state) if self.adapt_to_pi else state,
            "image": {
                slot: to_rgb(given[camera], f"images/{camera}") if camera in given else np.zeros_like(base)
                for slot, camera in _SLOTS.items()
            },
            "image_mask": {slot: seen & (camera in given) for slot, camera in _SLOTS.items()},
        }
        if "actions" in data:
            actions = np.asarray(data["actions"])
            inputs["actions"] = actions_to_pi0(actions) if self.adapt_to_pi else actions
        return inputs | {key: data[key] for key in ("prompt",) if key in data}

    def inverse(self, data: Data) -> Data:
        actions = np.asarray(data["actions"])[..., :ACTION_DIM]
        return {"actions": actions_from_pi0(actions) if self.adapt_to_pi else actions}


# The three functions below accept numpy arrays and JAX arrays; exported policies use the latter.

Numbers = Float[np.ndarray, "*batch 14"] | Float[Array, "*batch 14"]


@typed
def state_to_pi0(state: Numbers) -> Numbers:
    """Flip joint signs; convert grippers from finger travel (0 closed, 1 open) to motor angle in pi0's range."""
    finger = state[..., _GRIPPERS] * (_FINGER_OPEN - _FINGER_CLOSED) + _FINGER_CLOSED
    sine = (_HORN**2 + finger**2 - _ARM**2) / (2 * _HORN * finger)
    xp = _namespace(state)
    angle = xp.asin(xp.clip(sine, -1.0, 1.0))
    return _with_grippers(state, (angle - _PI0_CLOSED) / (_PI0_OPEN - _PI0_CLOSED))


@typed
def actions_to_pi0(actions: Numbers) -> Numbers:
    """Flip joint signs; convert grippers from the leader's range to an angle from pi0's closed position."""
    angle = actions[..., _GRIPPERS] * (_LEADER_OPEN - _LEADER_CLOSED) + _LEADER_CLOSED
    return _with_grippers(actions, angle - _PI0_CLOSED)


@typed
def actions_from_pi0(actions: Numbers) -> Numbers:
    """Invert ``actions_to_pi0``."""
    angle = actions[..., _GRIPPERS] + _PI0_CLOSED
    return _with_grippers(actions, (angle - _LEADER_CLOSED) / (_LEADER_OPEN - _LEADER_CLOSED))


def _with_grippers(x: Any, grippers: Any) -> Any:
    turned = x * _SIGNS.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    left, right = grippers[..., :1].astype(x.dtype), grippers[..., 1:].astype(x.dtype)
    return _namespace(x).concat([turned[..., :6], left, turned[..., 7:13], right], axis=-1)


def _namespace(x: Any) -> Any:
    """Return ``numpy`` or ``jax.numpy``."""
    return x.__array_namespace__()
