"""gym-aloha: what the adapter promises, and the expert."""

import numpy as np
import pytest

from acrlpd.envs import aloha
from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make

pytest.importorskip("gym_aloha")
CUBE = EnvConfig("aloha/transfer_cube")


@pytest.mark.parametrize("task", aloha.task_names())
def test_spec_and_seeds(task):
    environment = make(EnvConfig(f"aloha/{task}"))
    spec = environment.spec
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps, spec.fps) == (14, 14, 300, 50)
    assert spec.action_low[[6, 13]].tolist() == [0, 0]  # grippers closed
    assert spec.action_high[[6, 13]].tolist() == [1, 1]
    assert spec.action_low[1] == pytest.approx(-1.85, abs=1e-3)  # a shoulder's limit in rad
    assert {"top", "left_wrist", "right_wrist"} <= set(environment.simulator.cameras)

    def objects(seed):
        state = environment.reset(seed)["state"]
        assert state.tolist() == pytest.approx([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2, abs=2e-3)
        return environment.simulator._physics.data.qpos[16:].copy()

    first, other = objects(1), objects(2)
    assert np.abs(first - other).max() > 1e-2
    np.testing.assert_array_equal(objects(1), first)


def test_the_expert_hands_the_cube_over_and_noise_makes_it_fail():
    for noise, solved in (((0.0, 0.0), True), ((0.2, 0.2), False)):
        results = []
        collect(CUBE, [0], noise_range=noise, on_episode=results.append)
        assert results[0].success is solved
        assert results[0].error is None


def test_waypoints_are_met_in_order_and_end_where_the_episode_does():
    left, right = aloha.transfer_cube_waypoints(np.array([0.1, 0.5, 0.05]))
    for waypoints in (left, right):
        steps = [waypoint.step for waypoint in waypoints]
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, 300)
    position, quaternion, gripper = aloha._between(right, 125)  # closing round the cube
    np.testing.assert_allclose(position, [0.1, 0.5, 0.035])
    assert np.linalg.norm(quaternion) == pytest.approx(1)
    assert gripper == pytest.approx(0.5)


def test_the_insertion_task_says_that_it_has_no_expert():
    with pytest.raises(ValueError, match=r"no scripted expert for aloha/insertion: .*--policy random.*--data.path"):
        collect(EnvConfig("aloha/insertion"), [0], on_episode=lambda result: None)
