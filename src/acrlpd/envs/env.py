"""One interface for all simulators: sparse rewards, time limits, seeds and pictures mean the same in each of them.

An observation is one step, unbatched, in the form of openpi's data dictionary::

    {"state": float32 [s], "image": {camera: uint8 [h, w, 3]}, "prompt": str}

``image`` is empty if no cameras are configured or no picture was requested.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd import fields
from acrlpd.fields import PositiveInt

Obs: TypeAlias = dict[str, Any]
RewardKind: TypeAlias = Literal["-1/0", "0/1"]


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The choice of an environment and of its observations, rewards and time limit."""

    name: str = "metaworld/drawer-open-v3"  # "<simulator>/<task>"
    max_episode_steps: PositiveInt | None = None  # None: the simulator's own limit
    cameras: tuple[str, ...] = ()  # cameras in the observation; () for state only
    image_size: PositiveInt = 64  # pixels, height and width of every camera
    reward: RewardKind = "-1/0"  # -1 a step and 0 at success, or 0 a step and 1 at success
    instruction: str | None = None  # None: the task's own instruction

    def __post_init__(self) -> None:
        fields.check(self)


@dataclasses.dataclass(frozen=True, eq=False)
class EnvSpec:
    name: str
    instruction: str
    state_dim: int
    action_dim: int
    action_low: Float[np.ndarray, " a"]
    action_high: Float[np.ndarray, " a"]
    max_episode_steps: int
    cameras: tuple[str, ...]
    image_size: int
    fps: float  # control steps per second
    failure_reward: float  # reward of every step without success, -1 or 0; a step with success gets 1 more


@dataclasses.dataclass(frozen=True)
class Step:
    observation: Obs
    reward: float
    terminated: bool  # the task was solved, or failed for good
    truncated: bool  # the time limit was reached, or the simulator stopped for a reason outside the task
    success: bool


class Outcome(enum.Enum):
    """The state of the task after a step. A task that can fail for good should use rewards of 0 and 1
    (``EnvConfig.reward``): if every step costs 1, an early failure is cheap."""

    GOING_ON = "going on"
    SOLVED = "solved"
    FAILED = "failed"
    TRUNCATED = "truncated"  # stopped, for example by a time limit: the episode has ended, the task has not

    @classmethod
    def solved_if(cls, success: bool) -> Outcome:
        return cls.SOLVED if success else cls.GOING_ON


class PhysicsError(RuntimeError):
    """The simulation diverged or got numbers that are not finite. The episode is lost; the environment still works."""


class Environment(Protocol):
    """The interface that rollouts need. The same seed and the same actions give the same trajectory, bit for bit."""

    spec: EnvSpec

    def reset(self, seed: int, *, render: bool = True) -> Obs: ...

    def step(self, action: Float[np.ndarray, " a"], *, render: bool = False) -> Step:
        """Take a step. ``render`` adds pictures to the next observation; they cost far more than the physics."""
        ...

    def render(self, size: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return a picture of the current scene, for videos; no camera needs to be configured."""
        ...

    def close(self) -> None: ...


class Simulator(Protocol):
    """The interface of a simulator; ``SimulatedEnvironment`` adds everything that is the same for all simulators."""

    state_dim: int
    action_low: Float[np.ndarray, " a"]
    action_high: Float[np.ndarray, " a"]
    instruction: str
    time_limit: int
    fps: float
    cameras: tuple[str, ...]
    default_camera: str

    def reset(self, seed: int) -> Float[np.ndarray, " s"]: ...

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        """Return the next state and the outcome. Raise PhysicsError if the simulation diverges."""
        ...

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]: ...

    def close(self) -> None: ...


class SimulatedEnvironment:
    """A simulator with sparse rewards, a time limit and cameras.

    Success or final failure terminates the episode; the time limit or the simulator itself may truncate it. Actions
    are clipped to the action space.
    """

    def __init__(self, simulator: Simulator, config: EnvConfig):
        unknown = sorted(set(config.cameras) - set(simulator.cameras))
        if unknown:
            raise ValueError(f"{config.name} has no camera {unknown}; it has {list(simulator.cameras)}")
        action_low, action_high = action_bounds(config.name, simulator.action_low, simulator.action_high)
        self.simulator = simulator
        self.spec = EnvSpec(
            name=config.name,
            instruction=simulator.instruction if config.instruction is None else config.instruction,
            state_dim=simulator.state_dim,
            action_dim=len(action_low),
            action_low=action_low,
            action_high=action_high,
            max_episode_steps=config.max_episode_steps or simulator.time_limit,
            cameras=config.cameras,
            image_size=config.image_size,
            fps=simulator.fps,
            failure_reward=-1.0 if config.reward == "-1/0" else 0.0,
        )
        self._num_steps: int | None = None  # None: reset first

    def reset(self, seed: int, *, render: bool = True) -> Obs:
        state = self.simulator.reset(seed)
        self._num_steps = 0
        return self._observation(state, render)

    def step(self, action: Float[np.ndarray, " a"], *, render: bool = False) -> Step:
        if self._num_steps is None:
            raise RuntimeError(f"{self.spec.name}: step() before reset(), or after the end of the episode")
        steps, self._num_steps = self._num_steps + 1, None
        state, outcome = self.simulator.step(self._checked(action))
        terminated = Outcome(outcome) in (Outcome.SOLVED, Outcome.FAILED)  # raises for a value that is no Outcome
        success = outcome is Outcome.SOLVED
        late = steps >= self.spec.max_episode_steps
        truncated = not terminated and (late or outcome is Outcome.TRUNCATED)
        observation = self._observation(state, render)
        if not terminated and not truncated:
            self._num_steps = steps
        return Step(observation, self.spec.failure_reward + success, terminated, truncated, success)

    def render(self, size: int) -> UInt8[np.ndarray, "h w 3"]:
        camera = self.spec.cameras[0] if self.spec.cameras else self.simulator.default_camera
        return self.simulator.render(camera, size)

    def close(self) -> None:
        self.simulator.close()

    def _checked(self, action: Float[np.ndarray, " a"]) -> Float[np.ndarray, " a"]:
        if np.shape(action) != (self.spec.action_dim,):
            raise ValueError(f"{self.spec.name}: expected an action of {self.spec.action_dim}, got {np.shape(action)}")
        if not np.isfinite(action).all():
            raise PhysicsError(f"{self.spec.name}: expected a finite action, got {action}")
        return clip_action(self.spec, action)

    def _observation(self, state: Float[np.ndarray, " s"], render: bool) -> Obs:
        if not np.isfinite(state).all():
            raise PhysicsError(f"{self.spec.name}: the state is not finite")
        cameras = self.spec.cameras if render else ()
        images = {camera: self.simulator.render(camera, self.spec.image_size) for camera in cameras}
        return {"state": state.astype(np.float32), "image": images, "prompt": self.spec.instruction}


LARGEST_BOUND = 1e9  # a larger bound means that there is none, such as float32's maximum


def action_bounds(where: str, low: Any, high: Any) -> tuple[Float[np.ndarray, " a"], Float[np.ndarray, " a"]]:
    """Check the limits of an action space of any rank; return them flattened, as float32.

    Raises:
        ValueError: a limit is missing, not finite or too large. The message names the environment and the dimension.
    """
    lows, highs = (np.ravel(np.asarray(bound, np.float64)) for bound in (low, high))
    if lows.shape != highs.shape or not len(lows):
        raise ValueError(f"{where}: expected as many lower as upper action bounds, got {len(lows)} and {len(highs)}")
    bad = np.flatnonzero(~((lows >= -LARGEST_BOUND) & (highs <= LARGEST_BOUND) & (lows < highs)))  # true for nan, too
    if len(bad):
        raise ValueError(
            f"{where}: action {bad[0]} lies between {lows[bad[0]]:g} and {highs[bad[0]]:g}: a policy needs finite "
            "bounds, the lower one below the upper. Give the action space the range that the actuators have."
        )
    return lows.astype(np.float32), highs.astype(np.float32)


def clip_action(spec: EnvSpec, action: Float[np.ndarray, "*b a"]) -> Float[np.ndarray, "*b a"]:
    """Return the action that the environment executes for ``action``: float32, clipped to the action space."""
    return np.clip(np.asarray(action, np.float32), spec.action_low, spec.action_high)


def check_physics(data: Any) -> None:
    """Raise if MuJoCo has found numbers that are not finite: it then resets itself and only counts a warning."""
    import mujoco

    for kind in (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC):
        if data.warning[kind].number:
            raise PhysicsError(f"the simulation became unstable ({kind.name}) at {data.time:.2f} s")
