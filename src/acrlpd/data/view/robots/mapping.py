"""The robots of openpi's checkpoints: all steps before normalization, for recorded data and for clients' observations.

A store or a simulator gives ``state`` and ``image`` {camera: ...}, with camera names that differ between data sets;
openpi's clients send the robot's own keys. Both are converted to the input of the robot's transform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from acrlpd.data.view.robots import aloha, droid, libero
from acrlpd.data.view.transforms import Data, DeltaActions, Transform, make_bool_mask

Robot = Literal["aloha", "droid", "libero"]


def _same(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Platform:
    """One robot, as openpi defines it."""

    transform: Transform
    state_dim: int
    action_dim: int
    cameras: Mapping[str, tuple[str, ...]]  # robot's name: names in data sets, of which the first found is used
    prefix: str  # prefix of the robot's own picture keys
    optional: tuple[str, ...] = ()  # cameras that may be missing
    delta_mask: tuple[bool, ...] = ()  # relative actions of pi0's checkpoints
    delta_mask_pi05: tuple[bool, ...] = ()
    transform_fast: Transform | None = None  # for pi0-FAST's checkpoints, if their cameras or masks differ
    state_map: Callable[[Any], Any] = _same  # what ``transform`` does to a state, a numpy or JAX array
    action_map: Callable[[Any], Any] = _same  # what its inverse does to actions

    def names(self, cameras: Sequence[str]) -> dict[str, str]:
        """Map the robot's own camera names to those in the data. Cameras that openpi does not use are left out.

        Raises:
            ValueError: a camera that openpi needs is not there.
        """
        found = {own: next((name for name in names if name in cameras), None) for own, names in self.cameras.items()}
        for own, name in found.items():
            if name is None and own not in self.optional:
                raise ValueError(
                    f"expected a camera {' or '.join(self.cameras[own])}, got {', '.join(cameras) or 'no pictures'}"
                )
        return {own: name for own, name in found.items() if name is not None}

    def named(self, state: Any, pictures: Mapping[str, Any]) -> Data:
        """Return state and pictures under the robot's own keys."""
        if self.prefix == "images":
            return {"state": state, "images": dict(pictures)}
        return {f"{self.prefix}state": state} | {self.prefix + own: picture for own, picture in pictures.items()}


ROBOTS: dict[str, Platform] = {
    "aloha": Platform(
        aloha.Aloha(),
        *(aloha.STATE_DIM, aloha.ACTION_DIM, aloha.CAMERAS, "images"),
        optional=("cam_left_wrist", "cam_right_wrist"),
        delta_mask=aloha.DELTA_MASK,
        delta_mask_pi05=aloha.DELTA_MASK,
        state_map=aloha.state_to_pi0,
        action_map=aloha.actions_from_pi0,
    ),
    # joint velocities are already relative
    "droid": Platform(
        droid.Droid(),
        *(droid.STATE_DIM, droid.ACTION_DIM, droid.CAMERAS, "observation/"),
        transform_fast=droid.Droid(pi0_fast=True),
    ),
    # already relative; still, openpi subtracted the state once more to train pi0 and pi0-FAST, but not pi0.5
    "libero": Platform(
        libero.Libero(),
        *(libero.STATE_DIM, libero.ACTION_DIM, libero.CAMERAS, "observation/"),
        delta_mask=make_bool_mask(6, -1),
        transform_fast=libero.Libero(pi0_fast=True),
    ),
}


@dataclasses.dataclass(frozen=True)
class ToRobot:
    """A robot's transform, for recorded data and for observations of openpi's clients.

    If recorded data has no pictures (statistics, stored prefixes), only its numbers are mapped.
    """

    robot: Robot
    fast: bool = False  # use the variant of pi0-FAST's checkpoints

    @property
    def _transform(self) -> Transform:
        platform = ROBOTS[self.robot]
        return platform.transform_fast if self.fast and platform.transform_fast else platform.transform

    def __call__(self, data: Data) -> Data:
        platform = ROBOTS[self.robot]
        if any(key.startswith(platform.prefix) for key in data):
            return self._transform(data)
        state = np.asarray(data["state"])
        if state.shape[-1] != platform.state_dim:
            raise ValueError(f"{self.robot} has a state of {platform.state_dim} numbers, got {state.shape[-1]}")
        given = data.get("image", {})
        if given:
            pictures = {own: given[name] for own, name in platform.names(tuple(given)).items()}
        else:
            pictures = dict.fromkeys(platform.cameras, np.zeros((*state.shape[:-1], 1, 1, 3), np.uint8))
        rest = {key: data[key] for key in ("actions", "prompt") if key in data}
        there = self._transform(platform.named(state, pictures) | rest)
        return there if given else {key: value for key, value in there.items() if key not in ("image", "image_mask")}

    def inverse(self, data: Data) -> Data:
        return self._transform.inverse(data)


def before_normalization(
    robot: Robot | None, deltas: Sequence[int] | None, *, pi05: bool, fast: bool = False
) -> list[Transform]:
    """Return the robot's transform and the one to relative actions, if needed; ``deltas`` as in ``delta_mask``."""
    mask = delta_mask(robot, deltas, pi05=pi05)
    steps: list[Transform] = [] if robot is None else [ToRobot(robot, fast)]
    return [*steps, DeltaActions(mask)] if any(mask) else steps


def delta_mask(robot: Robot | None, deltas: Sequence[int] | None, *, pi05: bool) -> tuple[bool, ...]:
    """Return which actions are relative to the state: ``deltas`` in openpi's notation; None: openpi's for the robot."""
    if deltas is not None:
        return make_bool_mask(*deltas)
    if robot is None:
        return ()
    return ROBOTS[robot].delta_mask_pi05 if pi05 else ROBOTS[robot].delta_mask


def unseen(robot: Robot, cameras: Sequence[str]) -> tuple[str, ...]:
    """Return the model's cameras that data with ``cameras`` does not have; they are black and masked out."""
    picture = np.zeros((1, 1, 3), np.uint8)
    there = ToRobot(robot)({"state": np.zeros(ROBOTS[robot].state_dim), "image": dict.fromkeys(cameras, picture)})
    return tuple(camera for camera, mask in there.get("image_mask", {}).items() if not mask)


def fast_cameras(robot: Robot) -> tuple[str, ...]:
    """Return the cameras of a robot that pi0-FAST reads, sorted by name as in openpi."""
    picture, platform = np.zeros((1, 1, 3), np.uint8), ROBOTS[robot]
    images = {names[0]: picture for names in platform.cameras.values()}
    return tuple(sorted(ToRobot(robot, fast=True)({"state": np.zeros(platform.state_dim), "image": images})["image"]))


def check(
    robot: Robot | None,
    mask: Sequence[bool],
    *,
    where: str,
    dims: tuple[int, int],
    cameras: Sequence[str] | None,
    prefix: str = "data.",
) -> None:
    """Refuse data of another robot before any of it is read.

    Args:
        mask: which actions will be relative to the state.
        where: the path of the data, for messages.
        dims: dimensions of state and actions.
        cameras: cameras of the data; None if pictures are not needed.
        prefix: prefix of the options' names, for messages.
    """
    platform = None if robot is None else ROBOTS[robot]
    if platform is not None and dims != (platform.state_dim, platform.action_dim):
        raise ValueError(
            f"{where}: {prefix}robot={robot!r} needs {platform.state_dim} state and {platform.action_dim} action "
            f"dimensions, as openpi has them, got {dims[0]} and {dims[1]}. Choose the keys that make them with "
            f"{prefix}state_keys and {prefix}action_keys, or leave robot out (--{prefix}robot None) to use the data as "
            "it is"
        )
    if len(mask) > min(dims):
        raise ValueError(
            f"{where}: {prefix}delta_mask names {len(mask)} dimensions, but state and actions have {dims[0]} and "
            f"{dims[1]}"
        )
    if platform is not None and cameras is not None:
        try:
            platform.names(cameras)
        except ValueError as error:
            raise ValueError(
                f"{where}: {prefix}robot={robot!r}: {error}. Rename the data's cameras, choose with {prefix}cameras, "
                f"or leave robot out (--{prefix}robot None) to use the data as it is"
            ) from None
