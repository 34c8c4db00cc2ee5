"""Worker processes: the same episodes as in one process, and no run lost with a worker."""

import os
import signal

import numpy as np
import pytest
from tests.envs.test_custom import CAR

from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make_vector
from acrlpd.envs.rollout import OnlineCollector, rollout
from acrlpd.envs.vector import ProcessVectorEnv, RolloutConfig

CONFIG = EnvConfig(CAR, max_episode_steps=40)


def swing(observations, numbers):
    """Four steps in the direction of travel."""
    return np.stack([np.full((4, 1), np.sign(observation["state"][1])) for observation in observations])


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        assert (left.number, left.seed, left.success) == (right.number, right.seed, right.success)
        np.testing.assert_array_equal(left.episode.state, right.episode.state)
        np.testing.assert_array_equal(left.episode.actions, right.episode.actions)


@pytest.fixture(scope="module")
def workers():
    environments = make_vector(CONFIG, 3, RolloutConfig(num_workers=2))
    yield environments
    environments.close()


def test_workers_play_the_same_episodes(workers):
    assert workers.spec.instruction == "drive up the hill"
    local = rollout(make_vector(CONFIG, 3), swing, range(100, 107), execute_horizon=4)
    assert_same(local, rollout(workers, swing, range(100, 107), execute_horizon=4))


def test_a_killed_worker_costs_the_episodes_it_had(workers):
    killed = []

    def act(observations, numbers):
        if not killed and 3 in numbers.tolist():
            killed.append(workers._workers[1].pid)  # it has the second of three environments alone
            os.kill(killed[0], signal.SIGKILL)
        return swing(observations, numbers)

    whole = rollout(make_vector(CONFIG, 3), swing, range(100, 112), execute_horizon=4)
    results = rollout(workers, act, range(100, 112), execute_horizon=4)
    lost = {each.number for each in whole} - {each.number for each in results}
    assert len(lost) == 1
    assert workers._workers[1].pid != killed[0]
    assert_same([each for each in whole if each.number not in lost], results)


def test_a_hung_worker_is_replaced(workers):
    collector = OnlineCollector(workers, seed=0, execute_horizon=4)
    before = collector.collect(swing)
    assert (before.num_steps, before.num_lost) == (12, 0)
    for worker in workers._workers:
        worker._timeout_s = 2.0
    os.kill(workers._workers[0].pid, signal.SIGSTOP)  # it has two environments
    collected = collector.collect(swing)
    assert (collected.num_steps, collected.num_lost) == (4, 2)
    for worker in workers._workers:
        worker._timeout_s = 120.0
    after = collector.collect(swing)
    assert (after.num_steps, after.num_lost) == (12, 0)


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(ValueError, match="no such file") as caught:
        make_vector(EnvConfig("custom/no/such.py:make"), 1, RolloutConfig(num_workers=1))
    assert "In a worker process" in caught.value.__notes__[0]


def die():
    os._exit(3)


def test_a_worker_that_always_dies_is_given_up():
    with pytest.raises(RuntimeError, match=r"died \(exit code 3\), as did its 2 predecessors"):
        ProcessVectorEnv(die, 1, num_workers=1)


@pytest.mark.parametrize("options", [{"backend": "threads"}, {"backend": "ray"}, {"num_workers": -1}, {"timeout_s": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RolloutConfig(**options)
