"""OGBench's single-task manipulation environments: cube, scene and puzzle, with state observations.

Success is decided on the state *before* the action (OGBench's ``success_timing="pre"``), as in the relabelled rewards
of its data sets: the step in which the cube arrives still gives -1; the next one gives 0 and ends the episode,
whatever its action is. An episode that succeeds after L steps has return -(L-1).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.envs import rendering
from acrlpd.envs.env import Outcome, PhysicsError, check_physics


def task_names() -> tuple[str, ...]:
    """Return data set names as in OGBench's documentation, for example ``cube-single-play-singletask-task1-v0``."""
    registered = [_dataset_name(name) for name in _import().registry]
    return tuple(name for name in registered if name is not None)


class OGBench:
    """One single-task environment. The task is fixed; the seed draws the initial poses of arm and objects."""

    default_camera = "front"

    def __init__(self, task: str):
        gymnasium = _import()
        registered = task.replace("-play-", "-")
        self.task = task
        self.time_limit = gymnasium.spec(registered).max_episode_steps
        self._env: Any = gymnasium.make(registered, disable_env_checker=True).unwrapped
        self._renderers = rendering.Renderers()
        self.state_dim = len(self.reset(0))
        self.instruction = _instruction(registered, self._env.cur_task_info["task_name"])
        self.action_low = self._env.action_space.low.astype(np.float32)
        self.action_high = self._env.action_space.high.astype(np.float32)
        self.fps = 1.0 / self._env.control_timestep()
        model = self._env.model
        self.cameras = tuple(model.camera(index).name for index in range(model.ncam))

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        self._env.reset(seed=seed)
        self._forget_unseeded_steps()
        return self._env.compute_observation()

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        import mujoco

        try:
            state, _, _, _, info = self._env.step(action)
        except (mujoco.FatalError, np.linalg.LinAlgError) as error:  # LinAlgError: the inverse kinematics
            raise PhysicsError(str(error)) from error
        check_physics(self._env.data)
        return state, Outcome.solved_if(info["success"])

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        return self._renderers.render(self._env.model, self._env.data, camera, size)

    def close(self) -> None:
        self._renderers.close()
        self._env.close()

    def privileged_info(self) -> dict[str, Any]:
        """Return the input of OGBench's oracles for the first misplaced cube. Task mode omits the target's keys."""
        env = self._env
        info = env.compute_ob_info()
        block = next((index for index, placed in enumerate(env._compute_successes()) if not placed), 0)
        target = env._cube_target_mocap_ids[block]
        info["privileged/target_block"] = block
        info["privileged/target_block_pos"] = env.data.mocap_pos[target].copy()
        info["privileged/target_block_yaw"] = np.zeros(1)  # targets are axis-aligned
        return info

    def _forget_unseeded_steps(self) -> None:
        """Remove the traces of two random steps that a reset takes to render the goal, from an unseeded generator.

        They do not change positions and velocities, but the solver's warm start, the controls and the contact forces,
        one of which is observed. This keeps the former and clears the rest.
        """
        import mujoco

        env, data = self._env, self._env.data
        kept = {name: getattr(data, name).copy() for name in ("qpos", "qvel", "mocap_pos", "mocap_quat")}
        mujoco.mj_resetData(env.model, data)
        for name, values in kept.items():
            getattr(data, name)[:] = values
        env.pre_step()
        mujoco.mj_forward(env.model, data)
        env.post_step()


def _dataset_name(registered: str) -> str | None:
    """Map ``cube-single-singletask-task1-v0`` to ``cube-single-play-singletask-task1-v0``; return None for others."""
    ours = re.match(r"(cube|scene|puzzle)\b.*-singletask", registered)
    return registered.replace("-singletask", "-play-singletask") if ours else None


def _instruction(registered: str, task_name: str) -> str:
    """Make an instruction from OGBench's names, since it has no language: ``cube single: horizontal``."""
    scene = registered.partition("-singletask")[0].replace("-", " ")
    return f"{scene}: {re.sub(r'^task[0-9]+_', '', task_name).replace('_', ' ')}"


def _import() -> Any:
    """Return Gymnasium with OGBench's environments registered."""
    with rendering.simulator("ogbench", "OGBench"):
        import gymnasium
        import ogbench.manipspace  # noqa: F401
    return gymnasium
