"""A run small enough to train in seconds: a flow MLP on synthetic episodes, no simulator."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data.formats import hdf5
from acrlpd.models.critic import CriticConfig
from acrlpd.training import setup
from acrlpd.training.loop import ACRLPDTrainer
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
    return make_config(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ACRLPDTrainer:
    """A run that has been trained to its end, once for all tests: they look at it, or at ``copied_run``."""
    trainer = setup.make_trainer(make_config(tmp_path_factory.mktemp("finished")))
    trainer.train()
    return trainer


@pytest.fixture
def copied_run(finished: ACRLPDTrainer, tmp_path: Path) -> TrainConfig:
    """The configuration of a copy of the finished run, to resume or to damage."""
    config = dataclasses.replace(finished.config, run_dir=str(tmp_path))
    shutil.copytree(setup.run_files(finished.config).directory, setup.run_files(config).directory)
    return config


def make_config(tmp_path: Path) -> TrainConfig:
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
