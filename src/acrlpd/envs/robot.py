"""A real robot, or anything else with openpi's runtime interface, as one of our environments.

openpi describes a robot by four methods (``openpi_client.runtime.environment.Environment``); nothing else is needed
here. The object may drive the robot itself or be a proxy for one that is served elsewhere. Write a function that makes
a ``RobotSimulator`` from it, name it in ``EnvConfig.name`` (``custom/my_robot.py:make``), and use one environment and
no worker processes, since there is one robot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.envs.env import Outcome, action_bounds
from acrlpd.pictures import fit


class RuntimeEnvironment(Protocol):
    """openpi's interface of a robot."""

    def reset(self) -> None: ...

    def is_episode_complete(self) -> bool: ...

    def get_observation(self) -> dict: ...

    def apply_action(self, action: dict) -> None: ...


class RobotSimulator:
    """A robot behind our interface.

    Args:
        environment: the robot.
        instruction: the task in words.
        state: maps an observation to the vector that the policy sees.
        action_low, action_high: the limits of commands; actions are clipped to them.
        outcome: maps an observation and ``is_episode_complete()`` to the outcome for the task, with a sensor, a
            classifier or a person at a key. An episode that is complete while the task goes on is truncated.
        cameras: functions by camera name, each from an observation to its picture (see ``pictures.to_rgb``).
        fps: control rate; a step returns only when its period is over, as in openpi's ``Runtime``.
        time_limit: max. steps of an episode.

    A robot has no seeds: the scene is set up differently each time, so two policies cannot be compared seed by seed.
    """

    def __init__(
        self,
        environment: RuntimeEnvironment,
        *,
        instruction: str,
        state: Callable[[Mapping[str, Any]], Float[np.ndarray, " s"]],
        action_low: Float[np.ndarray, " a"],
        action_high: Float[np.ndarray, " a"],
        outcome: Callable[[Mapping[str, Any], bool], Outcome],
        cameras: Mapping[str, Callable[[Mapping[str, Any]], UInt8[np.ndarray, "h w 3"]]],
        fps: float,
        time_limit: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if fps <= 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self._environment = environment
        self._read_state = state
        self._outcome = outcome
        self._pictures = dict(cameras)
        self._clock, self._sleep = clock, sleep
        self._next_step = 0.0  # the earliest time at which the next step may return
        self.instruction = instruction
        self.time_limit = time_limit
        self.fps = fps
        self.action_low, self.action_high = action_bounds(type(environment).__name__, action_low, action_high)
        self.cameras = tuple(self._pictures)
        self.default_camera = next(iter(self._pictures), "none")
        self._observation: Mapping[str, Any] = environment.get_observation()
        self.state_dim = len(self._state())

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        self._environment.reset()
        self._observation = self._environment.get_observation()
        self._next_step = self._clock() + 1 / self.fps
        return self._state()

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        self._environment.apply_action({"actions": action})
        self._sleep(max(0.0, self._next_step - self._clock()))
        self._next_step = max(self._next_step, self._clock()) + 1 / self.fps  # no hurry after a slow policy
        self._observation = self._environment.get_observation()
        complete = self._environment.is_episode_complete()
        outcome = self._outcome(self._observation, complete)
        if complete and outcome is Outcome.GOING_ON:
            outcome = Outcome.TRUNCATED
        return self._state(), outcome

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        if camera not in self._pictures:
            raise RuntimeError(f"this robot has no camera {camera!r}; it has {list(self._pictures)}")
        return fit(self._pictures[camera](self._observation), size, size, f"camera {camera!r}")

    def close(self) -> None:
        """Do nothing: switching the robot off is up to its owner."""

    def _state(self) -> Float[np.ndarray, " s"]:
        return np.asarray(self._read_state(self._observation))
