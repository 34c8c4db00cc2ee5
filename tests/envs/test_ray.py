"""Ray actors on a cluster of this machine: the same episodes, and a killed actor costs those it had."""

import os

import numpy as np
import pytest
from tests.envs.test_custom import CAR
from tests.envs.test_vector import assert_same, swing

from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make_vector
from acrlpd.envs.rollout import rollout
from acrlpd.envs.vector import RolloutConfig

CONFIG = EnvConfig(CAR, max_episode_steps=40)


@pytest.fixture(scope="module")
def actors():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(PATHS)})
    environments = make_vector(CONFIG, 3, RolloutConfig(backend="ray", num_workers=2))
    yield environments
    environments.close()
    ray.shutdown()


PATHS = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


@pytest.mark.slow
def test_actors_play_the_same_episodes_and_may_die(actors):
    import ray

    whole = rollout(make_vector(CONFIG, 3), swing, range(100, 110), execute_horizon=4)
    assert_same(whole, rollout(actors, swing, range(100, 110), execute_horizon=4))

    killed = []

    def act(observations, numbers):
        if not killed and 3 in np.asarray(numbers).tolist():
            killed.append(actors.actors[1])
            ray.kill(killed[0])
        return swing(observations, numbers)

    results = rollout(actors, act, range(100, 110), execute_horizon=4)
    lost = {each.number for each in whole} - {each.number for each in results}
    assert len(lost) == 1
    assert_same([each for each in whole if each.number not in lost], results)
