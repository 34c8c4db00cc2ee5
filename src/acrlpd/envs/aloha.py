"""ALOHA in simulation (gym-aloha 0.1.5): two ViperX arms hand over a cube, or put a peg into a socket.

The state is 14 numbers: six joint angles (rad) and the gripper (0 closed, 1 open) of the left arm, then of the right
one. Actions are 14 absolute targets in the same order. Neither shows where the objects are, so a policy needs a camera.
The tasks give rewards from 0 to 4 by stages; only the last stage, which ends the episode, counts as success here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.envs import rendering
from acrlpd.envs.env import Outcome, PhysicsError, check_physics

TASKS = {"transfer_cube": "transfer the cube", "insertion": "insert the peg into the socket"}
STATE_DIM = 14
SOLVED_REWARD = 4


def task_names() -> tuple[str, ...]:
    return tuple(TASKS)


class Aloha:
    """The simulator of one task; the seed draws the positions of the objects."""

    state_dim = STATE_DIM
    default_camera = "top"
    time_limit = 300  # as in gym-aloha
    fps = 50.0

    def __init__(self, task: str):
        gym_aloha = _import()
        from dm_control import mujoco
        from dm_control.rl import control

        self.task = task
        self.instruction = TASKS[task]
        self._module = gym_aloha.tasks.sim
        self._utils = gym_aloha.utils
        path = gym_aloha.constants.ASSETS_DIR / f"bimanual_viperx_{task}.xml"
        self._physics: Any = mujoco.Physics.from_xml_path(str(path))
        tasks = {"transfer_cube": self._module.TransferCubeTask, "insertion": self._module.InsertionTask}
        self._task = tasks[task]()
        self._task.get_observation = lambda physics: {}  # the original renders three large pictures at every step
        self._env: Any = control.Environment(self._physics, self._task, control_timestep=1 / self.fps)
        self._renderers = rendering.Renderers()
        # Its action space claims -1 to 1, but actions are in radians: use the motors' limits.
        low, high = self._physics.model.ptr.actuator_ctrlrange.astype(np.float32).T
        joints = [*range(6), *range(8, 14)]  # the last two of an arm's eight motors are its fingers
        self.action_low, self.action_high = (_with_grippers(x[joints], end) for x, end in ((low, 0.0), (high, 1.0)))
        self.cameras = tuple(self._physics.model.ptr.camera(index).name for index in range(self._physics.model.ncam))

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        sample = self._utils.sample_box_pose if self.task == "transfer_cube" else self._utils.sample_insertion_pose
        self._module.BOX_POSE[0] = np.ravel(sample(seed))  # a global of the package, read by the reset
        self._env.reset()
        return self._state()

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        from dm_control.rl.control import PhysicsError as Diverged

        try:
            reward = self._env.step(action.astype(np.float64)).reward
        except Diverged as error:
            raise PhysicsError(str(error)) from error
        check_physics(self._physics.data.ptr)
        return self._state(), Outcome.solved_if(reward == SOLVED_REWARD)

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        return self._renderers.render(self._physics.model.ptr, self._physics.data.ptr, camera, size)

    def close(self) -> None:
        self._renderers.close()
        self._env.close()

    def cube(self) -> Float[np.ndarray, " 7"]:
        """Return the cube's position and quaternion, which the policy does not see."""
        return self._physics.data.qpos[-7:].copy()

    def _state(self) -> Float[np.ndarray, " s"]:
        return self._task.get_qpos(self._physics)


class Waypoint(NamedTuple):
    """The target pose of a gripper at ``step``, and how far it is open."""

    step: int
    position: Float[np.ndarray, " 3"]
    quaternion: Float[np.ndarray, " 4"]
    gripper: float


class TransferCubeExpert:
    """A scripted expert: the right arm lifts the cube and hands it to the left arm, along waypoints of both grippers.

    The joint angles come from gym-aloha's second scene, in which welds pull the grippers along the waypoints. They are
    computed once per episode from the cube's initial pose and executed open loop.
    """

    def __init__(self, simulator: Aloha):
        self._simulator = simulator
        self._actions: Float[np.ndarray, "t 14"] | None = None
        self._step = 0

    def __call__(self, observation: Any) -> Float[np.ndarray, " a"]:
        if self._actions is None:
            self._actions = transfer_cube_actions(self._simulator.cube())
        action = self._actions[min(self._step, len(self._actions) - 1)]
        self._step += 1
        return action


LEFT_START = np.array([-0.31718881, 0.5, 0.29525084])  # gripper position at the arms' start pose, metres in the scene
RIGHT_START = np.array([0.31718881, 0.5, 0.29525084])
LEVEL = np.array([1.0, 0, 0, 0])
MEETING = np.array([0.0, 0.5, 0.25])


def transfer_cube_waypoints(cube: Float[np.ndarray, " 3"]) -> tuple[list[Waypoint], list[Waypoint]]:
    """Return the waypoints of the left and of the right gripper, over 300 steps."""
    down = _rotation((0, 1, 0), -60)
    sideways = _rotation((1, 0, 0), 90)
    grasp = cube + _by(0, 0, -0.015)
    wait, take = MEETING + _by(-0.1, 0, -0.02), MEETING + _by(0.02, 0, -0.02)
    left = [
        Waypoint(0, LEFT_START, LEVEL, 0),
        Waypoint(80, wait, sideways, 1),
        Waypoint(215, take, sideways, 1),
        Waypoint(255, take, sideways, 0),
        Waypoint(300, wait, sideways, 0),
    ]
    right = [
        Waypoint(0, RIGHT_START, LEVEL, 0),
        Waypoint(75, cube + _by(0, 0, 0.08), down, 1),
        Waypoint(110, grasp, down, 1),
        Waypoint(140, grasp, down, 0),
        Waypoint(175, MEETING + _by(0.05, 0, 0), down, 0),
        Waypoint(195, MEETING, down, 0),
        Waypoint(255, MEETING, down, 0),
        Waypoint(270, MEETING, down, 1),
        Waypoint(300, MEETING + _by(0.1, 0, 0), down, 1),
    ]
    return left, right


def transfer_cube_actions(cube: Float[np.ndarray, " 7"]) -> Float[np.ndarray, "300 14"]:
    """Return joint angles and gripper commands at each step, for a cube at this pose."""
    gym_aloha = _import()
    import mujoco

    constants = gym_aloha.constants
    path = constants.ASSETS_DIR / "bimanual_viperx_end_effector_transfer_cube.xml"
    model: Any = mujoco.MjModel.from_xml_path(str(path))
    model.eq_solimp[:, :2] = 0.9  # by default, the welds lag centimetres behind
    data: Any = mujoco.MjData(model)
    data.qpos[:16] = constants.START_ARM_POSE
    data.qpos[16:] = cube
    arms = transfer_cube_waypoints(cube[:3])
    actions = []
    for step in range(300):
        grippers = []
        for side, waypoints in enumerate(arms):
            data.mocap_pos[side], data.mocap_quat[side], gripper = _between(waypoints, step)
            finger = constants.unnormalize_puppet_gripper_position(gripper)
            data.ctrl[2 * side : 2 * side + 2] = finger, -finger
            grippers.append(gripper)
        mujoco.mj_step(model, data, nstep=round(constants.DT / model.opt.timestep))
        joints = data.qpos[[*range(6), *range(8, 14)]]
        actions.append(_with_grippers(joints, np.array(grippers)))
    check_physics(data)
    return np.stack(actions).astype(np.float32)


def _between(waypoints: list[Waypoint], step: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Interpolate linearly between the last waypoint and the next."""
    after = next(index for index, waypoint in enumerate(waypoints) if waypoint.step > step)
    a, b = waypoints[after - 1], waypoints[after]
    share = (step - a.step) / (b.step - a.step)
    quaternion = (1 - share) * a.quaternion + share * b.quaternion
    return (
        (1 - share) * a.position + share * b.position,
        quaternion / np.linalg.norm(quaternion),
        (1 - share) * a.gripper + share * b.gripper,
    )


def _by(x: float, y: float, z: float) -> Float[np.ndarray, " 3"]:
    return np.array([x, y, z])


def _rotation(axis: tuple[float, float, float], degrees: float) -> Float[np.ndarray, " 4"]:
    """Return the quaternion (w, x, y, z) of a rotation about a unit axis."""
    half = np.radians(degrees) / 2
    return np.array([np.cos(half), *(np.sin(half) * np.array(axis))])


def _with_grippers(joints: np.ndarray, grippers: Any) -> np.ndarray:
    """Join 12 joints and one or two gripper values into 14 numbers; one value is used for both grippers."""
    left, right = np.broadcast_to(np.asarray(grippers, joints.dtype), 2)
    return np.concatenate([joints[:6], [left], joints[6:], [right]], dtype=joints.dtype)


def _import() -> Any:
    with rendering.simulator("aloha", "gym-aloha"):
        import gym_aloha.constants
        import gym_aloha.tasks.sim
        import gym_aloha.utils
    return gym_aloha
