"""The real simulators: seeds, limits, timing of success, pictures."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from acrlpd.envs import metaworld, ogbench, rendering
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make

DRAWER = "metaworld/drawer-open-v3"
CUBE = "ogbench/cube-single-play-singletask-task1-v0"


def require(name):
    pytest.importorskip(name.partition("/")[0])


def trajectory(environment, seed, steps=25):
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, environment.spec.action_dim))
    states = [environment.reset(seed)["state"]]
    return np.stack(states + [environment.step(action).observation["state"] for action in actions])


@pytest.mark.parametrize("name", [DRAWER, "metaworld/peg-insert-side-v3", CUBE])
def test_a_seed_fixes_the_trajectory_bit_for_bit(name):
    require(name)
    environment, fresh = make(EnvConfig(name)), make(EnvConfig(name))
    first = trajectory(environment, 1)
    other = trajectory(environment, 2)
    np.testing.assert_array_equal(trajectory(environment, 1), first)  # after another episode
    np.testing.assert_array_equal(trajectory(fresh, 1), first)  # in another environment
    assert (first[0] != other[0]).any()


@pytest.mark.slow
def test_every_metaworld_task_is_drawn_by_the_seed_alone():
    pytest.importorskip("metaworld")
    names = metaworld.task_names()
    assert len(names) == 50
    for name in names:
        environment = make(EnvConfig(f"metaworld/{name}"))
        first, other, again = (trajectory(environment, seed, steps=10) for seed in (1, 2, 1))
        np.testing.assert_array_equal(again, first, err_msg=name)
        assert np.abs(first[0] - other[0]).max() > 1e-3, name
        assert first.shape == (11, 39), name


def test_corner_cameras_are_turned_upright():
    pytest.importorskip("metaworld")
    simulator = make(EnvConfig(DRAWER)).simulator
    up = {name: simulator._env.data.camera(name).xmat.reshape(3, 3)[2, 1] for name in simulator.cameras}
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    simulator._renderers = SimpleNamespace(render=lambda model, data, camera, size: picture)
    for camera, height in up.items():
        expected = np.rot90(picture, 2) if height < -0.1 else picture
        np.testing.assert_array_equal(simulator.render(camera, 2), expected, err_msg=camera)


def test_metaworld_spec():
    pytest.importorskip("metaworld")
    spec = make(EnvConfig(DRAWER, max_episode_steps=150)).spec
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps) == (39, 4, 150)
    assert spec.action_low.tolist() == [-1] * 4
    assert spec.action_high.tolist() == [1] * 4
    assert spec.instruction == "drawer open"
    assert spec.fps == pytest.approx(80)
    assert make(EnvConfig(DRAWER)).spec.max_episode_steps == 500


def test_the_goal_is_observed():
    pytest.importorskip("metaworld")
    environment = make(EnvConfig("metaworld/reach-v3"))
    goals = np.stack([environment.reset(seed)["state"][-3:] for seed in (0, 1)])
    assert (goals[0] != goals[1]).any()
    after = environment.step(np.zeros(4)).observation["state"][-3:]
    np.testing.assert_array_equal(after, goals[1])


def test_ogbench_spec_and_names():
    pytest.importorskip("ogbench")
    spec = make(EnvConfig(CUBE)).spec
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps) == (28, 5, 200)
    assert spec.fps == pytest.approx(20)
    assert spec.instruction.startswith("cube single: ")
    names = ogbench.task_names()
    assert "cube-double-play-singletask-v0" in names
    assert "puzzle-3x3-play-singletask-task4-v0" in names
    assert not [name for name in names if "visual" in name or "maze" in name]


def test_ogbench_resets_leave_nothing_to_chance():
    pytest.importorskip("ogbench")
    environment = make(EnvConfig(CUBE))
    data = environment.simulator._env.data

    def hidden_state():
        environment.reset(4)
        return {key: getattr(data, key).copy() for key in ("qacc_warmstart", "ctrl", "cfrc_ext", "qpos", "mocap_pos")}

    first, second = hidden_state(), hidden_state()
    for key, values in first.items():
        np.testing.assert_array_equal(second[key], values, err_msg=key)
    assert (data.time, np.abs(first["mocap_pos"]).max() > 0) == (0, True)


def test_ogbench_judges_success_before_the_action():
    pytest.importorskip("ogbench")
    environment = make(EnvConfig(CUBE))
    environment.reset(0)
    data = environment.simulator._env.data
    data.joint("object_joint_0").qpos[:3] = data.mocap_pos[0]
    arrives = environment.step(np.zeros(5))
    assert (arrives.reward, arrives.success, arrives.terminated) == (-1, False, False)
    pays = environment.step(np.zeros(5))
    assert (pays.reward, pays.success, pays.terminated) == (0, True, True)


def test_a_missing_simulator_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "ogbench.manipspace", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[metaworld\]'"):
        make(EnvConfig(DRAWER))
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[ogbench\]'"):
        make(EnvConfig(CUBE))


def test_rendering_switched_off_says_what_to_install(monkeypatch):
    pytest.importorskip("metaworld")
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    environment = make(EnvConfig(DRAWER, cameras=("corner2",)))
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL turns it off.*libegl1.*libosmesa6"):
        environment.reset(0)


def test_the_users_backend_is_kept(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.choose_backend() == "osmesa"


@pytest.mark.parametrize(
    ("egl", "osmesa", "expected"), [(True, True, "egl"), (False, True, "osmesa"), (False, False, "disabled")]
)
def test_backends_in_order_of_preference(monkeypatch, egl, osmesa, expected):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rendering, "_egl_has_device", lambda: egl)
    monkeypatch.setattr(rendering, "_loads", lambda *names: osmesa)
    assert rendering.choose_backend() == expected
    assert os.environ["MUJOCO_GL"] == expected


RENDER = """
import numpy as np
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make
environment = make(EnvConfig({name!r}, cameras=({camera!r},), image_size=32))
with_pictures = [environment.reset(3)]
action = np.full(environment.spec.action_dim, 0.5)
for _ in range(8):
    with_pictures.append(environment.step(action, render=True).observation)
images = [observation["image"][{camera!r}] for observation in with_pictures]
assert images[0].shape == (32, 32, 3) and images[0].dtype == np.uint8
assert images[0].std() > 5, "the picture is blank"
assert (images[0] != images[-1]).any(), "the arm moved, the picture did not"
assert environment.render(300).shape == (300, 300, 3)
environment.reset(3, render=False)
states = [environment.step(action).observation["state"] for _ in range(8)]
for seen, blind in zip(with_pictures[1:], states, strict=True):
    np.testing.assert_array_equal(seen["state"], blind)
environment.close()
"""


@pytest.mark.rendering
@pytest.mark.slow
@pytest.mark.parametrize(("name", "camera"), [(DRAWER, "corner2"), (CUBE, "front")])
def test_pictures_do_not_disturb_the_physics(name, camera):
    require(name)
    if not (rendering._egl_has_device() or rendering._loads("libOSMesa.so.8", "libOSMesa.so")):
        pytest.skip(f"needs EGL or OSMesa: {rendering.PACKAGES}")
    # In a process of its own: MuJoCo chooses its backend once, and these tests run with none.
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    script = RENDER.format(name=name, camera=camera)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
