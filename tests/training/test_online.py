"""The online phase in a simulator that costs nothing: in step with the learner, and overlapping with it."""

import dataclasses

import numpy as np
import pytest
from tests.envs.test_custom import CAR

from acrlpd.agents.acrlpd import AgentConfig
from acrlpd.config import CollectConfig, DataConfig, EvalConfig, PolicyConfig, TrainConfig
from acrlpd.data.replay import ReplayJournal
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.vector import RolloutConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import setup
from acrlpd.training.metrics import read_jsonl

CONFIG = TrainConfig(
    env=EnvConfig(CAR, max_episode_steps=20),
    policy=PolicyConfig(kind="mlp_flow", action_horizon=4, hidden_dims=(16,)),
    agent=AgentConfig(critic=CriticConfig(num_critics=2, hidden_dims=(16,)), best_of_n_samples=3, flow_steps=2),
    data=DataConfig(collect=CollectConfig(episodes=3, policy="random"), batch_size=8),
    eval=EvalConfig(episodes=2, progress_episodes=2, num_envs=2),
    offline_steps=4,
    online_steps=120,
    online_envs=2,
    utd_ratio=0.5,
    log_frequency=4,
)


def trained(tmp_path, name, **changes):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), name=name, **changes)
    summary = setup.make_trainer(config).train()
    files = setup.run_files(config)
    ages = [each["rollout/policy_age_mean"] for each in read_jsonl(files.metrics) if "rollout/policy_age_mean" in each]
    return summary, list(ReplayJournal(files.replay).load()), ages


def assert_same(first, second):
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left.actions, right.actions)


@pytest.mark.slow
def test_updates_while_environments_work(tmp_path):
    in_step, episodes, ages = trained(tmp_path, "in-step")
    assert (in_step["updates"], in_step["env_steps"]) == (4 + 60, 120)
    assert len(episodes) == 6
    assert set(ages) == {0}

    overlapping, local, ages = trained(tmp_path, "local", overlap_rollouts=True)
    assert (overlapping["updates"], overlapping["env_steps"]) == (64, 120)
    assert set(ages[1:]) == {4}  # two environments, four steps each, half an update a step
    assert (local[-1].actions != episodes[-1].actions).any()  # chosen by another policy

    workers = RolloutConfig(num_workers=2)
    _, in_processes, ages = trained(tmp_path, "workers", overlap_rollouts=True, rollout=workers)
    assert_same(local, in_processes)  # where they are stepped makes no difference, overlapping or not
    assert set(ages[1:]) == {4}
