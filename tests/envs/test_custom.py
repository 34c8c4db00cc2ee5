from pathlib import Path

import gymnasium
import numpy as np
import pytest

from acrlpd.envs.custom import GymnasiumSimulator
from acrlpd.envs.env import EnvConfig, Outcome, SimulatedEnvironment
from acrlpd.envs.registry import make
from acrlpd.envs.rollout import rollout
from acrlpd.envs.vector import LocalVectorEnv

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
    with pytest.raises(ValueError, match="pass state="):
        GymnasiumSimulator(Pixels(), instruction="go", outcome=judge, time_limit=9)
    with pytest.raises(ValueError, match="give a time_limit"):
        GymnasiumSimulator(Pixels(), instruction="go", outcome=judge, state=lambda observation: observation["x"])
    cart_pole = gymnasium.make("CartPole-v1")
    with pytest.raises(ValueError, match="Box of actions"):
        GymnasiumSimulator(cart_pole, instruction="balance", outcome=judge)


class Table(gymnasium.Env):
    """A point moved by the first number of an action; the environment ends an episode itself, in the way it is told."""

    metadata = {"render_fps": 10}  # noqa: RUF012
    render_mode = None
    observation_space = gymnasium.spaces.Box(-9, 9, (1,))

    def __init__(self, box=None, *, ends=(), at=3):
        self.action_space = box or gymnasium.spaces.Box(-1, 1, (1,))
        self.ends, self.at = ends, at

    def reset(self, *, seed=None, options=None):
        self.seen = []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert len(self.seen) < self.at, "stepped after its end"
        self.seen.append(action)
        now = len(self.seen) == self.at
        state = np.full(1, len(self.seen), np.float32)
        return state, 0.0, now and "terminated" in self.ends, now and "truncated" in self.ends, {"last": now}


def on_table(env, outcome=lambda *_: Outcome.GOING_ON, time_limit=9):
    simulator = GymnasiumSimulator(env, instruction="go", outcome=outcome, time_limit=time_limit)
    return SimulatedEnvironment(simulator, EnvConfig("custom/table"))


@pytest.mark.parametrize(
    ("ends", "judged", "terminated", "success"),
    [
        (("truncated",), Outcome.GOING_ON, False, False),
        (("truncated",), Outcome.SOLVED, True, True),
        (("truncated",), Outcome.FAILED, True, False),
        (("truncated",), Outcome.TRUNCATED, False, False),
        (("terminated",), Outcome.GOING_ON, True, False),
        (("terminated",), Outcome.SOLVED, True, True),
        (("terminated",), Outcome.TRUNCATED, False, False),
        (("terminated", "truncated"), Outcome.GOING_ON, True, False),
        ((), Outcome.TRUNCATED, False, False),
        ((), Outcome.SOLVED, True, True),
    ],
)
def test_an_episode_ends_when_its_environment_does(ends, judged, terminated, success):
    env = Table(ends=ends)
    environment = on_table(env, lambda _, reward, ended, info: judged if info["last"] else Outcome.GOING_ON)
    (result,) = rollout(LocalVectorEnv([environment]), lambda o, n: np.zeros((1, 2, 1)), [0], execute_horizon=2)
    assert (result.length, result.success, len(env.seen)) == (3, success, 3)
    assert result.episode.terminals.tolist() == [False, False, terminated]
    assert result.episode.final.state == 3  # seen after the last action


@pytest.mark.parametrize("flag", [True, False])
def test_the_outcome_is_told_every_flag(flag):
    told = []
    environment = on_table(
        Table(ends=("truncated",) * flag, at=1), lambda *given: told.append(given) or Outcome.GOING_ON, time_limit=1
    )
    environment.reset(0)
    assert environment.step(np.zeros(1)).truncated
    ((observation, reward, terminated, info),) = told
    assert (observation, reward, terminated, info) == (1, 0.0, False, {"last": True, "truncated": flag})


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_box_of_any_rank_stands_in_a_row(shape, dtype):
    size = int(np.prod(shape, dtype=int))
    low = -np.arange(1, size + 1, dtype=dtype).reshape(shape) / 10
    env = Table(gymnasium.spaces.Box(low, -2 * low, shape, dtype))
    environment = on_table(env)
    assert environment.spec.action_dim == size
    np.testing.assert_allclose(environment.spec.action_high, -2 * low.ravel(), rtol=1e-6)
    environment.reset(0)
    actions = [np.linspace(-0.1, 0.1, size), np.full(size, 99.0), np.full(size, -99.0)]
    for action in actions:
        environment.step(action)
    for told, wanted in zip(env.seen, (actions[0], -2 * low, low), strict=True):
        assert env.action_space.contains(told)
        np.testing.assert_allclose(told, np.reshape(wanted, shape), rtol=1e-3)


@pytest.mark.parametrize(
    "box",
    [
        gymnasium.spaces.Box(-np.inf, np.inf, (2,)),
        gymnasium.spaces.Box(-1, np.inf, (2,)),
        gymnasium.spaces.Box(-3.4e38, 3.4e38, (2,)),
        gymnasium.spaces.Box(np.array([-1, -1e12]), np.array([1, 1e12]), dtype=np.float64),
        gymnasium.spaces.Box(np.array([-1.0, 2]), np.array([1.0, 2]), dtype=np.float64),
        gymnasium.spaces.Box(0, 255, (2,), np.uint8),
        gymnasium.spaces.Discrete(3),
        gymnasium.spaces.Dict({"arm": gymnasium.spaces.Box(-1, 1, (1,))}),
    ],
    ids=str,
)
def test_actions_without_a_range_are_refused_when_the_environment_is_wrapped(box):
    with pytest.raises(ValueError, match=r"<Table instance>: (action [01] lies between|a flow policy needs a Box)"):
        on_table(Table(box))


def test_a_simulator_of_ones_own_has_bounds_too(make_counting):
    simulator = make_counting().simulator
    simulator.action_high = np.array([1, np.inf], np.float32)
    with pytest.raises(ValueError, match="mine: action 1 lies between -1 and inf"):
        SimulatedEnvironment(simulator, EnvConfig("mine"))


def test_a_state_is_numbers_in_a_row():
    with pytest.raises(ValueError, match=r"a state is numbers in one row, got float32 of shape \(1, 1\)"):
        GymnasiumSimulator(
            Table(), instruction="go", outcome=judge, time_limit=9, state=lambda observation: observation[None]
        )


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
