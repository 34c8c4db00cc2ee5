"""Your own environment: a small file maps it to our interface. ``examples/mountain_car.py`` is an example.

``EnvConfig.name`` is ``custom/FILE.py:FUNCTION`` (a path) or ``custom/MODULE:FUNCTION``; the function takes no argument
and returns a ``Simulator``, for a Gymnasium environment usually a ``GymnasiumSimulator``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd import named_code
from acrlpd.envs import rendering
from acrlpd.envs.env import Outcome, Simulator, action_bounds
from acrlpd.pictures import fit


def load(task: str) -> Simulator:
    """Return the simulator that ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` makes."""
    rendering.choose_backend()  # before the file imports a simulator
    return named_code.load(task, prefix="custom/")()


class GymnasiumSimulator:
    """A Gymnasium environment with a Box of actions, behind our interface.

    The Box may have any rank; actions are flattened here. An episode ends when the environment says so: ``truncated``
    counts as a time limit and ``terminated`` as a failure, unless ``outcome`` returns something else.

    Args:
        env: the environment, made with ``render_mode="rgb_array"`` if pictures are wanted.
        instruction: the task in words.
        outcome: maps a step's (observation, reward, terminated, info) to the outcome for the task;
            ``info["truncated"]`` is the environment's own flag.
        state: maps an observation to the vector that the policy sees; by default the flattened observation.
        cameras: functions by camera name, each from an observation to its picture (see ``pictures.to_rgb``), for
            environments whose observations contain pictures.
        time_limit: None uses the environment's own limit.

    An additional camera, ``render``, shows ``env.render()``.
    """

    default_camera = "render"

    def __init__(
        self,
        env: Any,
        *,
        instruction: str,
        outcome: Callable[[Any, float, bool, Mapping[str, Any]], Outcome],
        state: Callable[[Any], Float[np.ndarray, " s"]] | None = None,
        cameras: Mapping[str, Callable[[Any], UInt8[np.ndarray, "h w 3"]]] | None = None,
        time_limit: int | None = None,
    ):
        space = env.action_space
        if not hasattr(space, "low") or np.dtype(space.dtype).kind != "f":
            raise ValueError(f"{env}: a flow policy needs a Box of actions that are floats, got {space}")
        if state is None and len(env.observation_space.shape or ()) == 0:
            raise ValueError(f"{env}: observes {env.observation_space}; pass state=..., which returns one row")
        limit = time_limit or (env.spec.max_episode_steps if env.spec else None)
        if limit is None:
            raise ValueError(f"{env} has no time limit of its own: give a time_limit")
        self._env = env
        self._outcome = outcome
        self._state = np.ravel if state is None else state
        self._pictures = dict(cameras or {})
        self._observation: Any = None
        self.instruction = instruction
        self.time_limit = limit
        self.action_low, self.action_high = action_bounds(str(env), space.low, space.high)
        self.fps = float(env.metadata.get("render_fps", 30))
        self.cameras = (*self._pictures, "render")
        first = self.reset(0)
        if first.ndim != 1 or first.dtype.kind not in "fiub":
            raise ValueError(f"{env}: a state is numbers in one row, got {first.dtype} of shape {first.shape}")
        self.state_dim = len(first)

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        self._observation, _ = self._env.reset(seed=seed)
        return np.asarray(self._state(self._observation))

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        box = self._env.action_space
        told = np.asarray(action, box.dtype).reshape(box.shape)
        inside = np.asarray(np.clip(told, box.low, box.high))  # float32 bounds may lie slightly outside float64 ones
        self._observation, reward, terminated, truncated, info = self._env.step(inside)
        flags = {**info, "truncated": bool(truncated)}
        outcome = self._outcome(self._observation, float(reward), bool(terminated), flags)
        if outcome is Outcome.GOING_ON and (terminated or truncated):
            outcome = Outcome.FAILED if terminated else Outcome.TRUNCATED
        return np.asarray(self._state(self._observation)), outcome

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        picture = self._pictures[camera](self._observation) if camera in self._pictures else self._frame()
        return fit(picture, size, size, f"{self._env}: camera {camera!r}")

    def close(self) -> None:
        self._env.close()

    def _frame(self) -> Any:
        if self._env.render_mode != "rgb_array":
            raise RuntimeError(f"{self._env} renders nothing: make it with render_mode='rgb_array'")
        return self._env.render()
