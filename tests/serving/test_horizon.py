"""A checkpoint acts by critics of the horizon that they were trained with, whatever its version wrote about it."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from acrlpd import deploy
from acrlpd.config import to_dict
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.training import setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CONFIG, OBS, STATS


@pytest.mark.parametrize(
    ("named", "has_field", "trained_with"),
    [(None, True, 2), (3, True, 3), (None, False, 5)],  # the last: of a version whose critics judged whole chunks
)
def test_critics_are_of_the_horizon_they_were_trained_with(named, has_field, trained_with, tmp_path):
    config = dataclasses.replace(CONFIG, execute_horizon=2)
    config = config if named is None else config.with_critic_horizon(named)
    stored = to_dict(config)
    if not has_field:
        del stored["agent"]["critic"]["horizon"]
    agent = setup.make_agent(config.with_critic_horizon(trained_with), setup.Dims(3, 2), ())
    manager = ACRLPDCheckpointManager(tmp_path / "checkpoints")
    manager.save(agent, asset_id="tiny", norm_stats=STATS, run={"config": stored, "cameras": []})
    manager.wait()
    manager.close()

    trained = deploy.load_trained(tmp_path)
    assert trained.agent.nets.critic_horizon == trained.config.critic_horizon == trained_with
    jax.tree.map(np.testing.assert_array_equal, trained.agent.params["critic"], agent.params["critic"])
    obs = OBS | {OPTIONS_KEY: {"seed": 0, "statistics": True}}
    answer = deploy.trained_policy(trained, deploy.ActingOptions()).infer(obs)
    assert answer["actions"].shape == (5, 2)
    assert len(set(answer["policy_statistics"]["q_candidates"])) == 4
