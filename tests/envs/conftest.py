"""A simulator one can work out by hand."""

import numpy as np
import pytest

from acrlpd.envs.env import EnvConfig, Outcome, PhysicsError, SimulatedEnvironment


class CountingSimulator:
    """The state is (seed, sum of the first action numbers); the task is to reach 3, and is failed
    below 0. A first number of -1 breaks the simulation."""

    state_dim = 2
    action_low = -np.ones(2, np.float32)
    action_high = np.ones(2, np.float32)
    instruction = "count to three"
    time_limit = 10
    fps = 20.0
    cameras = ("front", "wrist")
    default_camera = "front"

    def __init__(self):
        self.seeds: list[int] = []
        self.actions: list[np.ndarray] = []
        self.renders = 0

    def reset(self, seed):
        self.seeds.append(seed)
        self.state = np.array([seed, 0.0])
        return self.state.copy()

    def step(self, action):
        self.actions.append(action)
        if action[0] == -1:
            raise PhysicsError("it blew up")
        self.state[1] += action[0]
        if self.state[1] < 0:
            return self.state.copy(), Outcome.FAILED
        return self.state.copy(), Outcome.solved_if(self.state[1] >= 3)

    def render(self, camera, size):
        self.renders += 1
        return np.full((size, size, 3), 10 * self.cameras.index(camera) + int(self.state[1]), np.uint8)

    def close(self):
        pass


@pytest.fixture
def make_counting():
    def make(**config) -> SimulatedEnvironment:
        return SimulatedEnvironment(CountingSimulator(), EnvConfig("counting", image_size=4, **config))

    return make
