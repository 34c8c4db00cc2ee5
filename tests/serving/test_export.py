"""What an export holds: a checkpoint with fewer critics, the inference function on its own, the policy for PyTorch."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from acrlpd import deploy
from acrlpd.cli.main import main
from acrlpd.data.formats import hdf5
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.sources import open_episodes
from acrlpd.data.store import windows
from acrlpd.data.view import normalize
from acrlpd.deploy import export as deploy_export
from acrlpd.models import torch_names, weights
from acrlpd.presets import NANO
from acrlpd.serving import export
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.training import build
from acrlpd.types import Episode

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CONFIG, OBS, STATS, save

ALONE = """
import json, sys
import jax, numpy as np
from safetensors.numpy import load_file
folder, seed = sys.argv[1], int(sys.argv[2])
exported = jax.export.deserialize(open(f"{folder}/inference.stablehlo", "rb").read())
described = json.load(open(f"{folder}/inputs.json"))["inputs"]
inputs = {name: np.zeros(each["shape"], each["dtype"]) for name, each in described.items()}
inputs["state"][0] = [0.5, 1.5, 0.0]
inputs["seed"][0] = seed
inputs["tokenized_prompt"][0], inputs["tokenized_prompt_mask"][0] = np.load(sys.argv[3])
outputs = exported.call(load_file(f"{folder}/weights.safetensors"), inputs)
assert "acrlpd" not in sys.modules
print(json.dumps({name: np.asarray(value).tolist() for name, value in outputs.items()}))
"""


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    rng = np.random.default_rng(0)
    for number in range(2):
        terminals = np.arange(12) == 11
        episode = Episode(
            state=rng.normal(size=(12, 3)).astype(np.float32),
            actions=rng.normal(size=(12, 2)).astype(np.float32),
            rewards=np.where(terminals, 0.0, -1.0).astype(np.float32),
            terminals=terminals,
            task="open",
            success=True,
        )
        hdf5.write_episode(hdf5.episode_path(folder, number), episode)
    return folder


def alone(folder: Path, seed: int, prompt: Path) -> dict:
    """The exported function in a process that has only jax, numpy and safetensors."""
    command = [sys.executable, "-c", ALONE, str(folder), str(seed), str(prompt)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_export_acts_like_the_agent_it_was_made_of(run, tmp_path, policy, capsys):
    assert main(["export", "--checkpoint", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    obs = OBS | {OPTIONS_KEY: {"seed": 7, "statistics": True}}
    expected = policy.infer(obs)
    exported = deploy.trained_policy(deploy.load_trained(tmp_path / "out"), deploy.ActingOptions())
    np.testing.assert_allclose(exported.infer(obs)["actions"], expected["actions"], atol=1e-6)
    request = policy.prepare(obs)
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, np.stack([request.observation.tokenized_prompt, request.observation.tokenized_prompt_mask]))
    outputs = alone(tmp_path / "out" / "stablehlo", 7, prompt)
    np.testing.assert_allclose(outputs["actions"][0], expected["actions"], atol=1e-4)
    assert outputs["q"][0] == pytest.approx(expected["policy_statistics"]["q"], abs=1e-4)
    with pytest.raises(ValueError, match="exists already"):
        deploy.export_acrlpd_model(run, tmp_path / "out")


def test_fast_keeps_the_three_best_critics_and_takes_ten_steps(trained, run, episodes, tmp_path, monkeypatch):
    """The errors are given: critics 1, 3 and 0 are best."""
    errors = iter(np.array([[0.3, 0.1, 0.9, 0.2]] * deploy_export.TD_BATCHES))
    monkeypatch.setattr(export, "member_td_errors", lambda *_: next(errors))
    deploy.export_acrlpd_model(run, tmp_path / "out", "fast", data=episodes)
    small = deploy.load_trained(tmp_path / "out")
    assert small.config.agent.critic.num_critics == 3
    assert small.config.agent.flow_steps == 10
    kept = jax.tree.map(lambda x: x[np.array([0, 1, 3])], trained.agent.params["critic"])
    jax.tree.map(np.testing.assert_array_equal, small.agent.params["critic"], kept)
    answer = deploy.trained_policy(small, deploy.ActingOptions()).infer(OBS)
    assert answer["actions"].shape == (5, 2)


def test_td_errors_of_members_with_an_implicit_target(trained, episodes):
    """The target is V's where the agent has one: with V made constant, that number."""
    agent_config = trained.config.agent
    temperature = dataclasses.replace(agent_config.temperature, adaptive=False)
    agent_config = dataclasses.replace(agent_config, target="implicit", temperature=temperature, discount=1.0)
    config = dataclasses.replace(trained.config, agent=agent_config)
    agent = build.create_agent(config, trained.dims, ())
    value = jax.tree.map(jax.numpy.zeros_like, agent.params["value"])
    value["out"]["bias"] += 7
    agent = dataclasses.replace(agent, params=agent.params | {"value": value})
    batch = jax.device_put(loader_batch(trained, episodes))
    found = export.member_td_errors(agent, batch, jax.random.key(0))
    prefix = agent.acting_modules().policy.encode(batch.observations)
    q = agent.nets.modules(agent.params, agent.frozen).critic(prefix.features, prefix.state, batch.actions[None])[:, 0]
    target = (batch.valid * batch.rewards).sum(axis=1) + 7 * batch.bootstrap_mask
    mask = np.asarray(batch.sequence_mask)
    expected = (np.abs(np.asarray(q) - np.asarray(target)) * mask).sum(axis=1) / mask.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_td_errors_of_members_by_hand(trained, episodes):
    """With gamma 0 the target is the first reward, whatever the next state is worth."""
    config = dataclasses.replace(trained.config.agent, discount=1e-9)
    nets = dataclasses.replace(trained.agent.nets, config=config)
    agent = dataclasses.replace(trained.agent, nets=nets)
    batch = jax.device_put(loader_batch(trained, episodes))
    found = export.member_td_errors(agent, batch, jax.random.key(0))
    modules = agent.acting_modules()
    prefix = modules.policy.encode(batch.observations)
    q = modules.critic(prefix.features, prefix.state, batch.actions[None])[:, 0]
    mask = np.asarray(batch.sequence_mask)
    expected = (np.abs(np.asarray(q) - np.asarray(batch.rewards)[:, 0]) * mask).sum(axis=1) / mask.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def loader_batch(trained, episodes):
    store = windows.open_store(open_episodes(str(episodes)))
    transform = build.make_transform(trained.config, trained.stats, trained.dims)
    return ChunkLoader(store, transform, batch_size=16, horizon=5, sequence_ratio=0.5, seed=0).batch(0)


@pytest.mark.slow
def test_a_pi0_is_exported_for_pytorch_and_for_openpis_server(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        policy=dataclasses.replace(NANO, max_token_len=8, unroll=True),
        agent=dataclasses.replace(CONFIG.agent, best_of_n_samples=2, flow_steps=2),
    )
    save(tmp_path / "run", 3, config=config, cameras=("base",))
    out = Path(deploy.export_acrlpd_model(tmp_path / "run", tmp_path / "out", platform="libero"))
    trained = deploy.load_trained(out)
    assert (trained.config.agent.best_of_n_samples, trained.config.agent.flow_steps) == (16, 10)
    params = weights.read_params(out / "3")  # where openpi's server looks
    (stats_file,) = (out / "3" / "assets").rglob(normalize.FILE_NAME)
    stats = normalize.load(stats_file)
    np.testing.assert_array_equal(stats["state"].mean, STATS["state"].mean)
    for name, array in load_file(out / "pytorch" / "model.safetensors").items():
        np.testing.assert_array_equal(array, torch_names.to_torch(params)[name])
    policy = deploy.trained_policy(trained, deploy.ActingOptions())
    obs = OBS | {"image": {"base": np.zeros((64, 64, 3), np.uint8)}, "prompt": "open", OPTIONS_KEY: {"seed": 5}}
    request = policy.prepare(obs)
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, np.stack([request.observation.tokenized_prompt, request.observation.tokenized_prompt_mask]))
    outputs = alone(out / "stablehlo", 5, prompt)
    np.testing.assert_allclose(outputs["actions"][0], policy.infer(obs)["actions"], atol=1e-3)
