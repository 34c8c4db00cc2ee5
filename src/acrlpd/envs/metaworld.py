"""MetaWorld's 50 manipulation tasks (metaworld 3.1.1): a state has 39 numbers, an action 4."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.envs import rendering
from acrlpd.envs.env import Outcome, PhysicsError, check_physics

MAX_EPISODE_STEPS = 500  # MetaWorld's own limit


def task_names() -> tuple[str, ...]:
    return tuple(_import().env_dict.ALL_V3_ENVIRONMENTS)


class MetaWorld:
    """The simulator of one MetaWorld task; every reset draws its variation of the task from the seed.

    The goal is part of the state (its last three numbers), so that every task can be solved from the observation.
    """

    default_camera = "corner2"
    instruction: str
    time_limit = MAX_EPISODE_STEPS

    def __init__(self, task: str):
        metaworld = _import()
        env = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()
        # The classes that MetaWorld registers freeze the task drawn at construction. We let them draw from their own
        # seeded generator at every reset, as its benchmarks do to make their lists of tasks.
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached while the goal was hidden; steps are clipped to it
        env.max_path_length = np.iinfo(np.int64).max  # we apply our own time limit
        self._env: Any = env
        self._renderers = rendering.Renderers()
        self.task = task
        self.instruction = task.removesuffix("-v3").replace("-", " ")
        self.action_low = env.action_space.low.astype(np.float32)
        self.action_high = env.action_space.high.astype(np.float32)
        self.state_dim = env.sawyer_observation_space.shape[0]
        self.fps = 1.0 / env.dt
        self.cameras = tuple(env.model.camera(index).name for index in range(env.model.ncam))

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        self._env.seed(seed)  # reset(seed=...) ignores its seed
        state, _ = self._env.reset()
        return state

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        import mujoco

        try:
            state, _, _, _, info = self._env.step(action)
        except mujoco.FatalError as error:
            raise PhysicsError(str(error)) from error
        check_physics(self._env.data)
        return state, Outcome.solved_if(info["success"])

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        picture = self._renderers.render(self._env.model, self._env.data, camera, size)
        # MetaWorld's corner cameras are upside down; policies were pretrained on upright pictures.
        return picture[::-1, ::-1].copy() if camera.startswith("corner") else picture

    def close(self) -> None:
        self._renderers.close()
        self._env.close()


def _import() -> Any:
    with rendering.simulator("metaworld", "MetaWorld"):
        import metaworld
        import metaworld.env_dict
        import metaworld.policies
    return metaworld
