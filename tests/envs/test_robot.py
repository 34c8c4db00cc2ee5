"""openpi's runtime interface as an environment, with a robot of three lines and a clock that waits for nobody."""

import numpy as np
import pytest

from acrlpd.envs.env import EnvConfig, Outcome, SimulatedEnvironment
from acrlpd.envs.robot import RobotSimulator
from acrlpd.envs.rollout import rollout
from acrlpd.envs.vector import LocalVectorEnv


class Robot:
    """Complete when its position reaches 3."""

    def __init__(self):
        self.position, self.resets, self.applied = 0.0, 0, []

    def reset(self):
        self.position, self.resets = 0.0, self.resets + 1

    def is_episode_complete(self):
        return self.position >= 3

    def get_observation(self):
        return {"joints": [self.position], "image": np.full((6, 8, 3), int(self.position), np.uint8)}

    def apply_action(self, action):
        self.applied.append(action["actions"])
        self.position += float(action["actions"][0])


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def make_robot(robot, clock, **changes):
    options = {
        "instruction": "go on",
        "state": lambda observation: observation["joints"],
        "action_low": [-1],
        "action_high": [1],
        "outcome": lambda observation, complete: Outcome.solved_if(complete),
        "cameras": {"front": lambda observation: observation["image"]},
        "fps": 10.0,
        "time_limit": 5,
        "clock": clock,
        "sleep": clock.sleep,
    } | changes
    return SimulatedEnvironment(RobotSimulator(robot, **options), EnvConfig("robot", cameras=("front",), image_size=4))


def test_episodes_on_a_robot():
    robot, clock = Robot(), Clock()
    environments = LocalVectorEnv([make_robot(robot, clock)])
    act = lambda observations, numbers: np.full((1, 2, 1), 7.0 if numbers[0] == 0 else 0.1)  # noqa: E731
    solved, late = rollout(environments, act, [0, 1], execute_horizon=2, record_images=True)
    assert (solved.success, solved.length, late.success, late.length) == (True, 3, False, 5)
    assert robot.resets == 2
    assert [float(action[0]) for action in robot.applied[:3]] == [1, 1, 1]  # clipped to what may be commanded
    assert solved.episode.images["front"].shape == (3, 4, 4, 3)
    assert solved.episode.state.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("judged", list(Outcome))
def test_a_robot_that_is_complete_is_not_moved_on(judged):
    robot = Robot()
    environment = make_robot(
        robot, Clock(), outcome=lambda observation, complete: judged if complete else Outcome.GOING_ON
    )
    environment.reset(0)
    steps = [environment.step(np.ones(1)) for _ in range(3)]
    assert [step.terminated or step.truncated for step in steps] == [False, False, True]
    assert steps[-1].truncated == (judged in (Outcome.GOING_ON, Outcome.TRUNCATED))
    assert steps[-1].success == (judged is Outcome.SOLVED)


def test_steps_keep_the_control_rate():
    robot, clock = Robot(), Clock()
    environment = make_robot(robot, clock)
    environment.reset(0)
    clock.now += 0.04  # the policy thinks
    environment.step(np.zeros(1))
    environment.step(np.zeros(1))
    clock.now += 0.5  # too long: nothing is left to wait for
    environment.step(np.zeros(1))
    environment.step(np.zeros(1))
    assert clock.slept == pytest.approx([0.06, 0.1, 0.0, 0.1])


def test_a_camera_that_is_not_there():
    environment = make_robot(Robot(), Clock())
    with pytest.raises(RuntimeError, match="no camera 'top'"):
        environment.simulator.render("top", 4)
