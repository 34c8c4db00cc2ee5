"""A guided agent that is served, continues chunks, and is exported: the same chunks as where it was trained."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from acrlpd import deploy
from acrlpd.config import to_dict
from acrlpd.deploy import export as deploy_export
from acrlpd.serving import export
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.training import setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CONFIG, OBS, STATS

WEIGHTS = (0.0, 3.0)
ASKED = OBS | {OPTIONS_KEY: {"seed": 7, "statistics": True}}


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory) -> Path:
    """A run whose averages choose and whose target critics, which are others, guide."""
    choices = {"extraction": "guided", "guidance_weights": WEIGHTS, "policy_ema_decay": 0.9}
    config = dataclasses.replace(CONFIG, agent=dataclasses.replace(CONFIG.agent, **choices))
    agent = setup.make_agent(config, setup.Dims(3, 2), ())
    target = jax.tree.map(lambda x: x[::-1] * 2, agent.target_critic)
    agent = dataclasses.replace(agent, target_critic=target, q_scale=jnp.float32(0.5))
    folder = tmp_path_factory.mktemp("guided")
    manager = ACRLPDCheckpointManager(folder / "checkpoints")
    manager.save(agent, asset_id="tiny", norm_stats=STATS, run={"config": to_dict(config), "cameras": []})
    manager.wait()
    manager.close()
    return folder


@pytest.fixture(scope="module")
def guided(guided_run) -> deploy.Trained:
    return deploy.load_trained(guided_run)


@pytest.fixture(scope="module")
def answer(guided):
    return deploy.trained_policy(guided, deploy.ActingOptions()).infer(ASKED)


def test_what_is_served_is_what_the_agent_does(guided, answer):
    policy = deploy.trained_policy(guided, deploy.ActingOptions())
    observation = jax.tree.map(lambda x: x[None], policy.prepare(ASKED).observation)
    for name, agent in (("guided", guided.agent), ("best_of_n", guided.agent.with_extraction("best_of_n"))):
        chunk = agent.sample_actions(observation, jax.random.key(7)[None])[0]
        actions = np.asarray(chunk) * (STATS["actions"].std + 1e-6) + STATS["actions"].mean
        assert np.allclose(answer["actions"], actions, atol=1e-5) == (name == "guided")
    told = answer["policy_statistics"]
    assert told["guidance_weight"] == WEIGHTS[told["chosen"] % 2]


def test_other_weights_are_served_where_they_are_asked_for(guided_run):
    other = deploy.load_trained(guided_run, None, (2.0,))
    assert other.config.agent.guidance_weights == other.agent.config.guidance_weights == (2.0,)
    with pytest.raises(ValueError, match="have no effect with extraction 'best_of_n'"):
        deploy.load_trained(guided_run, "best_of_n", (2.0,))


def test_a_guided_chunk_continues_the_one_before(guided, answer):
    policy = deploy.trained_policy(guided, deploy.ActingOptions(real_time=True, num_steps=10))
    previous = answer["actions"][1:]

    def asking(**options):
        return policy.infer(OBS | {OPTIONS_KEY: {"seed": 8, "statistics": True, **options}})

    free, continued = asking(), asking(previous_actions=previous, delay=3)
    gaps = [np.abs(each["actions"][:3] - previous[:3]).max() for each in (free, continued)]
    assert gaps[1] < 0.3 * gaps[0]
    assert len(set(continued["policy_statistics"]["q_candidates"])) == 4


def test_an_export_with_fewer_critics_is_guided_by_their_targets(guided_run, guided, tmp_path, monkeypatch):
    """Critics 1, 3 and 0 are kept. The exported checkpoint and the exported function agree."""
    monkeypatch.setattr(deploy_export, "best_critics", lambda *_: np.array([0, 1, 3]))
    out = Path(deploy.export_acrlpd_model(guided_run, tmp_path / "out", "fast"))
    small = deploy.load_trained(out)
    kept = jax.tree.map(lambda x: x[np.array([0, 1, 3])], guided.agent.target_critic)
    jax.tree.map(np.testing.assert_array_equal, small.agent.target_critic, kept)
    assert float(small.agent.q_scale) == 0.5
    policy = deploy.trained_policy(small, deploy.ActingOptions())
    request = policy.prepare(ASKED)
    exported = jax.export.deserialize((out / "stablehlo" / export.FUNCTION).read_bytes())
    inputs = {
        "state": OBS["state"][None],
        "tokenized_prompt": request.observation.tokenized_prompt[None],
        "tokenized_prompt_mask": request.observation.tokenized_prompt_mask[None],
        "seed": np.array([7], np.uint32),
    }
    outputs = exported.call(load_file(out / "stablehlo" / export.WEIGHTS), inputs)
    np.testing.assert_allclose(outputs["actions"][0], policy.infer(ASKED)["actions"], atol=1e-4)
