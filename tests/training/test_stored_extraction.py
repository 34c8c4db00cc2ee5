"""A run with an extraction of the user's own: trained, resumed, exported and served by it, where its user names it."""

import asyncio
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.envs.test_custom import CAR
from tests.training.test_online import CONFIG

from acrlpd import deploy
from acrlpd.agents import extraction
from acrlpd.cli import serve
from acrlpd.cli.main import main
from acrlpd.founding.regression import ACRLPDRegressionTester
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.training import loading, setup
from acrlpd.training.metrics import read_jsonl
from acrlpd.types import Observation

OWN = """
import dataclasses
from pathlib import Path
import jax.numpy as jnp
from acrlpd.agents.extraction import BestOfN

Path(__file__).with_suffix(".ran").touch()

@dataclasses.dataclass(frozen=True)
class Halved:
    num_steps: int
    action_clip: float | None

    def propose(self, modules, prefix, noise):
        return 0.5 * BestOfN.propose(self, modules, prefix, noise)

    def actor_loss(self, modules, prefix, noise, temperature):
        return jnp.square(self.propose(modules, prefix, noise)).mean(), {"chunks": jnp.float32(len(noise))}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, with the code beside it."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "own.py").write_text(OWN)
    agent = dataclasses.replace(CONFIG.agent, extraction=name(folder / "run"), actor_samples=3)
    config = dataclasses.replace(CONFIG, agent=agent, run_dir=str(folder), name="run", online_steps=0, log_frequency=2)
    setup.make_trainer(config).train()
    return folder / "run"


def name(run):
    return f"{run.parent / 'own.py'}:Halved"


@pytest.fixture
def ran(run):
    """Whether the code has been run since, as if this process had not run it before."""
    extraction._loaded.cache_clear()
    jax.clear_caches()
    mark = run.parent / "own.ran"
    mark.unlink(missing_ok=True)
    return mark.exists


STATE = {"state": np.array([-0.5, 0.0], np.float32), "prompt": "drive up the hill"}


def chunk(loaded, mode="greedy"):
    """The normalized chunk for one observation."""
    seen = Observation(state=np.asarray(loaded.transform(STATE)["state"])[None])
    return np.asarray(loaded.agent.sample_actions(seen, jax.random.key(0), mode=mode))


def test_it_trains(run):
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "train/chunks" in line]
    assert [line["train/chunks"] for line in lines] == [3, 3]
    assert all(line["train/actor_loss"] > 0 for line in lines)


def test_python_acts_by_it_only_where_a_script_names_it(run, ran):
    for load in (loading.load_checkpoint, loading.load_stored):
        with pytest.raises(ValueError, match=r"runs no code by itself.*load_checkpoint\(path, extraction=\.\.\.\)"):
            chunk(load(run))
    assert np.isfinite(chunk(loading.load_checkpoint(run), mode="bc")).all()
    with pytest.raises(ValueError, match="runs no code by itself"):
        setup.make_trainer(loading.load_checkpoint(run).config, resume=True)
    with pytest.raises(ValueError, match="runs no code by itself"):
        ACRLPDRegressionTester().test_numerical_stability(run)
    plain = chunk(loading.load_checkpoint(run, extraction="best_of_n"))
    assert not ran()
    own = loading.load_checkpoint(run, extraction=name(run))
    assert not np.array_equal(chunk(own), plain)
    assert ran()
    assert ACRLPDRegressionTester(extraction=name(run)).test_numerical_stability(run)


def commands(run, tmp_path):
    """The words of each command that needs it, and the flag that names it."""
    one = ["--checkpoint", str(run)]
    return {
        "eval": (["eval", *one, "--episodes", "1", "--tasks", CAR], "--extraction"),
        "compare": (
            ["eval", *one, "--extraction", "best_of_n", "--compare", str(run), "--episodes", "1", "--tasks", CAR],
            "--compare_extraction",
        ),
        "collect": (
            ["collect", "--policy", "checkpoint", *one, "--episodes", "1", "--output", str(tmp_path), "--name", CAR],
            "--extraction",
        ),
        "export": (["export", *one, "--output_dir", str(tmp_path / "out")], "--extraction"),
        "serve": (["serve", *one, "--port", "0"], "--extraction"),
        "train": (
            ["train", "--resume", str(run), "--offline_steps", "6", "--override", "--env.name", CAR],
            "--agent.extraction",
        ),
    }


@pytest.mark.parametrize("command", ["eval", "compare", "collect", "export", "serve", "train"])
def test_a_command_runs_it_only_if_it_names_it(run, ran, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(serve.PolicyServer, "run", lambda self, on_ready: asyncio.sleep(0))
    words, flag = commands(run, tmp_path)[command]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"--extraction {name(run)}" in told
    assert flag.removeprefix("--compare_") in told
    assert not ran()
    assert main([*words, flag, "elsewhere.py:Own"]) == 2
    assert not ran()
    assert main([*words, flag, name(run)]) == 0
    assert ran()


def test_a_yaml_file_of_the_users_names_it_as_well(run, ran, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"base_config: debug\nname: run\nrun_dir: {run.parent}\nenv:\n  name: {CAR}\n"
        f"agent:\n  extraction: {name(run)}\n"
    )
    assert main(["train", str(file), "--resume", "--offline_steps", "8", "--override"]) == 0
    assert ran()


def test_what_is_served_and_exported_is_what_the_agent_chooses(run, tmp_path):
    own = loading.load_checkpoint(run, extraction=name(run))
    policy = deploy.trained_policy(deploy.load_trained(run, name(run)), deploy.ActingOptions())
    served = policy.infer(STATE | {OPTIONS_KEY: {"seed": 3}})["actions"]
    seen = Observation(state=np.asarray(own.transform(STATE)["state"])[None])
    chosen = own.agent.sample_actions(seen, jax.random.wrap_key_data(jnp.array([0, 3], jnp.uint32)))
    expected = own.transform.inverse(STATE | {"actions": np.asarray(chosen)[0]})["actions"]
    np.testing.assert_allclose(served, expected, atol=1e-5)
    folder = tmp_path / "out"
    deploy.export_acrlpd_model(run, folder, extraction=name(run))
    again = deploy.load_trained(folder, name(run))
    np.testing.assert_allclose(
        deploy.trained_policy(again, deploy.ActingOptions()).infer(STATE | {OPTIONS_KEY: {"seed": 3}})["actions"],
        served,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="runs no code by itself"):
        deploy.trained_policy(deploy.load_trained(folder), deploy.ActingOptions())
    program = jax.export.deserialize((folder / "stablehlo/inference.stablehlo").read_bytes())
    inputs = {"state": STATE["state"][None], "seed": np.array([3], np.uint32)}
    prompt = {each: np.zeros(shape, kind) for each, shape, kind in described(folder) if each not in inputs}
    answer = program.call(load_file(folder / "stablehlo/weights.safetensors"), inputs | prompt)
    np.testing.assert_allclose(answer["actions"][0], served, atol=1e-4)


def described(folder):
    inputs = json.loads((folder / "stablehlo/inputs.json").read_text())["inputs"]
    return [(each, value["shape"], value["dtype"]) for each, value in inputs.items()]


def test_continued_chunks_are_its_own(run):
    """Guided towards the chunk under way, the candidates are still what the extraction makes of the flow."""
    options = deploy.ActingOptions(real_time=True)
    asked = STATE | {OPTIONS_KEY: {"seed": 3, "previous_actions": np.zeros((3, 1), np.float32), "delay": 1}}
    own, plain = (
        deploy.trained_policy(deploy.load_trained(run, each), options).infer(asked)["actions"]
        for each in (name(run), "best_of_n")
    )
    assert np.abs(own - plain).max() > 0


def test_a_server_of_openpis_checkpoint_has_no_use_for_one():
    with pytest.raises(ValueError, match="has no critic that extraction"):
        deploy.openpi_policy("x", deploy.OpenPIOptions(robot="libero"), deploy.ActingOptions(extraction="best_of_n"))
