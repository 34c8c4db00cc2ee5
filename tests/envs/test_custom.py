from pathlib import Path

import gymnasium
import numpy as np
import pytest

from acrlpd.envs.custom import GymnasiumSimulator
from acrlpd.envs.env import EnvConfig, Outcome, make

CAR = f"custom/{Path(__file__).parents[2] / 'examples' / 'mountain_car.py'}:mountain_car"


def push(environment, steps=400):
    """Always in the direction of travel, which swings the car up the hill."""
    observation = environment.reset(3)
    for number in range(1, steps + 1):
        step = environment.step(np.sign(observation["state"][1:]))
        observation = step.observation
        if step.terminated or step.truncated:
            return number, step
    raise AssertionError("no end")


def test_the_example_maps_a_gymnasium_environment():
    environment = make(EnvConfig(CAR))
    assert environment.spec.instruction == "drive up the hill"
    assert (environment.spec.state_dim, environment.spec.action_dim) == (2, 1)
    number, step = push(environment)
    assert number < 300
    assert (step.success, step.terminated, step.reward) == (True, True, 0)
    assert push(environment)[0] == number  # seeded
    number, step = push(make(EnvConfig(CAR, max_episode_steps=20)))
    assert (number, step.truncated, step.success) == (20, True, False)


def test_a_file_may_define_dataclasses(tmp_path):
    """They look for their module by its name."""
    file = tmp_path / "mine.py"
    text = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Mine:\n    x: int = 0\n"
    )
    file.write_text(text)
    with pytest.raises(ValueError, match="has no function 'make'"):
        make(EnvConfig(f"custom/{file}:make"))


class Pixels(gymnasium.Env):
    """Observes a picture and a number; fails below -1, renders nothing."""

    observation_space = gymnasium.spaces.Dict(
        {"pixels": gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8), "x": gymnasium.spaces.Box(-5, 5)}
    )
    action_space = gymnasium.spaces.Box(-1, 1)

    def reset(self, *, seed=None, options=None):
        self.x = np.zeros(1, np.float32)
        return self.observe(), {}

    def step(self, action):
        self.x = self.x + action
        return self.observe(), 0.0, bool(abs(self.x[0]) > 1), False, {"won": self.x[0] > 1}

    def observe(self):
        return {"pixels": np.full((8, 8, 3), 100 + int(10 * self.x[0]), np.uint8), "x": self.x}


def judge(observation, reward, terminated, info):
    if not terminated:
        return Outcome.GOING_ON
    return Outcome.SOLVED if info["won"] else Outcome.FAILED


def test_pictures_and_failures_of_a_gymnasium_environment():
    simulator = GymnasiumSimulator(
        Pixels(),
        instruction="go right",
        outcome=judge,
        state=lambda observation: observation["x"],
        cameras={"top": lambda observation: observation["pixels"]},
        time_limit=9,
    )
    assert simulator.cameras == ("top", "render")
    simulator.reset(0)
    assert simulator.step(np.ones(1))[1] is Outcome.GOING_ON
    assert simulator.render("top", 4).tolist() == np.full((4, 4, 3), 110).tolist()
    assert simulator.step(np.ones(1))[1] is Outcome.SOLVED
    simulator.reset(0)
    assert [simulator.step(-np.ones(1))[1] for _ in range(2)] == [Outcome.GOING_ON, Outcome.FAILED]
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        simulator.render("render", 4)


def test_what_a_mapping_must_say():
    with pytest.raises(ValueError, match="say by state="):
        GymnasiumSimulator(Pixels(), instruction="go", outcome=judge, time_limit=9)
    with pytest.raises(ValueError, match="give a time_limit"):
        GymnasiumSimulator(Pixels(), instruction="go", outcome=judge, state=lambda observation: observation["x"])
    cart_pole = gymnasium.make("CartPole-v1")
    with pytest.raises(ValueError, match="Box of actions"):
        GymnasiumSimulator(cart_pole, instruction="balance", outcome=judge)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom/nothing", "expected custom/FILE.py:FUNCTION"),
        ("custom/no/such.py:make", "no such file"),
        (CAR + "s", "has no function 'mountain_cars'"),
    ],
)
def test_a_name_that_leads_nowhere(name, message):
    with pytest.raises(ValueError, match=message):
        make(EnvConfig(name))
