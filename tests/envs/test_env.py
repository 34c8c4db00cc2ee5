import numpy as np
import pytest

from acrlpd.envs.env import EnvConfig, PhysicsError, check_physics
from acrlpd.envs.registry import make

UP = np.array([1.0, 0.0], np.float32)
STAY = np.zeros(2, np.float32)
DOWN = np.array([-0.5, 0.0], np.float32)


@pytest.mark.parametrize(("reward", "expected"), [("-1/0", [-1, -1, 0]), ("0/1", [0, 0, 1])])
def test_success_pays_and_terminates(make_counting, reward, expected):
    environment = make_counting(reward=reward)
    environment.reset(0)
    steps = [environment.step(UP) for _ in range(3)]
    assert [step.reward for step in steps] == expected
    assert [step.terminated for step in steps] == [False, False, True]
    assert [step.success for step in steps] == [False, False, True]
    assert not any(step.truncated for step in steps)


def test_the_time_limit_truncates_and_does_not_terminate(make_counting):
    environment = make_counting(max_episode_steps=4)
    environment.reset(0)
    steps = [environment.step(STAY) for _ in range(4)]
    assert [step.truncated for step in steps] == [False, False, False, True]
    assert not any(step.terminated or step.success for step in steps)
    assert [step.reward for step in steps] == [-1] * 4


def test_success_at_the_time_limit_terminates(make_counting):
    environment = make_counting(max_episode_steps=3)
    environment.reset(0)
    last = [environment.step(UP) for _ in range(3)][-1]
    assert (last.terminated, last.truncated, last.reward) == (True, False, 0)


def test_final_failure_terminates_without_success(make_counting):
    environment = make_counting(reward="0/1")
    environment.reset(0)
    step = environment.step(DOWN)
    assert (step.terminated, step.truncated, step.success, step.reward) == (True, False, False, 0)


def test_a_finished_episode_needs_a_reset(make_counting):
    environment = make_counting(max_episode_steps=1)
    with pytest.raises(RuntimeError, match="before reset"):
        environment.step(UP)
    environment.reset(0)
    environment.step(UP)
    with pytest.raises(RuntimeError, match="after the end of the episode"):
        environment.step(UP)
    environment.reset(1)
    assert environment.step(STAY).observation["state"].tolist() == [1, 0]


def test_actions_are_clipped_and_checked(make_counting):
    environment = make_counting()
    environment.reset(0)
    environment.step(np.array([5.0, -7.0]))
    np.testing.assert_array_equal(environment.simulator.actions[0], np.array([1, -1], np.float32))
    with pytest.raises(ValueError, match=r"expected an action of 2, got \(3,\)"):
        environment.step(np.zeros(3))
    environment.reset(0)
    with pytest.raises(PhysicsError, match="expected a finite action"):
        environment.step(np.array([np.nan, 0]))
    assert len(environment.simulator.actions) == 1


def test_a_state_that_is_not_finite_is_a_physics_error(make_counting):
    environment = make_counting()
    environment.reset(0)
    environment.simulator.state[0] = np.nan
    with pytest.raises(PhysicsError, match="counting: the state is not finite"):
        environment.step(UP)


def test_pictures_are_rendered_only_when_asked_for(make_counting):
    environment = make_counting(cameras=("wrist", "front"))
    observation = environment.reset(5)
    assert observation["state"].tolist() == [5, 0]
    assert observation["state"].dtype == np.float32
    assert observation["prompt"] == "count to three"
    assert list(observation["image"]) == ["wrist", "front"]
    assert environment.simulator.renders == 2
    assert environment.step(UP).observation["image"] == {}
    assert environment.simulator.renders == 2
    images = environment.step(UP, render=True).observation["image"]
    np.testing.assert_array_equal(images["wrist"], np.full((4, 4, 3), 12, np.uint8))
    assert environment.render(8).shape == (8, 8, 3)


def test_no_cameras_no_pictures(make_counting):
    environment = make_counting()
    assert environment.reset(0)["image"] == {}
    assert environment.step(UP, render=True).observation["image"] == {}
    assert environment.simulator.renders == 0
    assert environment.render(8).shape == (8, 8, 3)  # a video needs no camera in the observation


def test_an_unknown_camera_is_answered_with_the_known(make_counting):
    with pytest.raises(ValueError, match=r"no camera \['top'\]; it has \['front', 'wrist'\]"):
        make_counting(cameras=("top",))


def test_the_instruction_can_be_replaced(make_counting):
    assert make_counting(instruction="zähle").reset(0)["prompt"] == "zähle"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"image_size": 0}, "image_size"),
        ({"reward": "dense"}, "reward must be '-1/0' or '0/1', got 'dense'"),
    ],
)
def test_a_config_refuses_nonsense(fields, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**fields)


@pytest.mark.parametrize(
    ("extra", "name", "suggestion"),
    [
        ("metaworld", "metaworld/draw-open-v3", "'metaworld/drawer-open-v3'"),
        ("metaworld", "metaworld/drawer-open", "'metaworld/drawer-open-v3'"),
        ("ogbench", "ogbench/cube-singel-play-singletask-task1-v0", "'ogbench/cube-single-play-singletask-task1-v0'"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest(extra, name, suggestion):
    pytest.importorskip(extra)
    with pytest.raises(ValueError, match=f"unknown environment '{name}'; did you mean .*{suggestion}"):
        make(EnvConfig(name))


def test_an_unknown_simulator_is_answered_with_the_known():
    with pytest.raises(ValueError, match="did you mean 'metaworld/'"):
        make(EnvConfig("meta-world/drawer-open-v3"))


def test_mujoco_warnings_become_physics_errors():
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data)
    check_physics(data)
    data.warning[mujoco.mjtWarning.mjWARN_BADQVEL].number += 1
    with pytest.raises(PhysicsError, match=r"unstable \(mjWARN_BADQVEL\)"):
        check_physics(data)
