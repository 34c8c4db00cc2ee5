"""A run small enough to train in seconds: a flow MLP on synthetic episodes, no simulator."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from acrlpd.agents.acrlpd import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data import hdf5
from acrlpd.models.critic import CriticConfig
from acrlpd.types import Episode


def make_episode(rng: np.random.Generator, length: int, *, success: bool) -> Episode:
    terminals = np.zeros(length, bool)
    terminals[-1] = success
    return Episode(
        state=rng.normal(size=(length, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(length, 2)).astype(np.float32),
        rewards=np.where(terminals, 0.0, -1.0).astype(np.float32),
        terminals=terminals,
        task="push the button",
        success=success,
    )


@pytest.fixture
def tiny_config(tmp_path: Path) -> TrainConfig:
    rng = np.random.default_rng(0)
    for number in range(4):
        path = hdf5.episode_path(tmp_path / "data", number)
        path.parent.mkdir(exist_ok=True)
        hdf5.write_episode(path, make_episode(rng, 9 + number, success=number % 2 == 0))
    return TrainConfig(
        name="tiny",
        run_dir=str(tmp_path / "runs"),
        policy=PolicyConfig(kind="mlp_flow", action_horizon=3, hidden_dims=(16,)),
        agent=AgentConfig(
            critic=CriticConfig(num_critics=2, hidden_dims=(16,), dropout_rate=0.1),
            best_of_n_samples=3,
            flow_steps=2,
        ),
        data=DataConfig(path=str(tmp_path / "data"), batch_size=8, action_normalization="z_score"),
        offline_steps=8,
        online_steps=0,
        log_frequency=2,
        save_frequency=4,
    )


def longer(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, **changes)
