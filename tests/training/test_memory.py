"""A plan allocates nothing and counts what a run will hold."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from acrlpd import presets
from acrlpd.agents.state import CRITIC_GROUPS
from acrlpd.cli.main import main
from acrlpd.overrides import apply_config_overrides
from acrlpd.training import memory, setup
from acrlpd.training.memory import Machine
from acrlpd.training.setup import Dims

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
DIMS = Dims(4, 2)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5 kb", 1500), ("7", 7), ("2G", 2 * 10**9)]
)
def test_sizes(text, expected):
    assert memory.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "3 apples", "GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        memory.parse_bytes(text)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


IMPLICIT = {"agent.target": "implicit", "agent.temperature.adaptive": False}


LONG = IMPLICIT | {"execute_horizon": 1, "agent.critic.horizon": 1, "agent.critic.backup_horizon": 2}


@pytest.mark.parametrize("changes", [{}, IMPLICIT, LONG])
def test_a_plan_counts_what_the_agent_holds(tiny_config, changes):
    tiny_config = apply_config_overrides(tiny_config, changes)
    found = memory.plan(tiny_config, Machine(1), dims=DIMS)
    agent = setup.make_agent(tiny_config, DIMS, ())
    assert found.parameter_bytes == nbytes((agent.params, agent.frozen, agent.target_critic))
    assert found.optimizer_bytes == nbytes(agent.opt_state)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(agent.params["policy"]))
    beside = {group: tree for group, tree in agent.params.items() if group in CRITIC_GROUPS}
    assert found.critic_parameters == sum(leaf.size for leaf in jax.tree.leaves(beside))
    assert found.activation_bytes > 0
    assert found.fits


def test_a_plan_that_does_not_fit_says_what_to_change(tiny_config):
    found = memory.plan(tiny_config, Machine(2, device_memory=1000), dims=DIMS)
    assert (found.fits, found.local_batch) == (False, 4)
    assert any("--fsdp_devices 2" in line for line in memory.advice(tiny_config, found))
    assert any("chunked" in line for line in memory.advice(tiny_config, found))
    with pytest.raises(ValueError, match="must be a multiple of the number of devices"):
        memory.plan(dataclasses.replace(tiny_config), Machine(3), dims=DIMS)


def test_a_target_without_candidates_needs_less_and_none_are_advised_away(tiny_config):
    many = apply_config_overrides(tiny_config, {"agent.target_samples": 64})
    plans = [memory.plan(apply_config_overrides(many, each), Machine(1), dims=DIMS) for each in ({}, IMPLICIT)]
    assert plans[1].activation_bytes < plans[0].activation_bytes / 2
    small = dataclasses.replace(plans[1], machine=Machine(1, device_memory=1000))
    assert not any("candidates" in line for line in memory.advice(apply_config_overrides(many, IMPLICIT), small))


@pytest.mark.parametrize("algorithm", [None, "rlpd-ac"])
def test_advice_can_be_followed(tiny_config, algorithm):
    """Each line is a change that the configuration takes: a policy without a backbone cannot freeze it."""
    config = presets.with_algorithm(tiny_config, algorithm) if algorithm else tiny_config
    found = dataclasses.replace(memory.plan(tiny_config, Machine(1), dims=DIMS), machine=Machine(2, device_memory=1000))
    for line in memory.advice(config, found):
        flag, value = line.partition(":")[0].removeprefix("--").partition(" ")[::2]
        assert apply_config_overrides(config, {flag: yaml.safe_load(value) if value else True}) != config


def test_what_the_matrix_library_allocates_is_found_in_the_compilers_text():
    """Where a compiler writes its fusions in another way, plans lack this memory, and nothing but this test says so."""
    outline = jax.ShapeDtypeStruct((8, 16, 10, 8), "float32")
    text = jax.jit(lambda x: jnp.var(x, axis=0)).lower(outline).compile(memory.QUICKLY).as_text()
    assert "fusion(" in text
    assert memory._library_bytes(text) == 3 * 16 * 10 * 8 * 4


def test_large_arrays_are_split_over_the_fsdp_axis(tiny_config, monkeypatch):
    monkeypatch.setattr("acrlpd.training.sharding.MIN_SHARDED_BYTES", 1)
    config = dataclasses.replace(tiny_config, fsdp_devices=2)
    tree = {"kernel": jax.ShapeDtypeStruct((8, 3), "float32"), "bias": jax.ShapeDtypeStruct((3,), "float32")}
    assert memory._local_bytes(config, Machine(4), tree) == 8 * 3 * 4 // 2 + 3 * 4


def test_the_command(tmp_path, capsys, tiny_config):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "base_config: droid\npolicy: {kind: mlp_flow, action_dim: null, hidden_dims: [8], action_horizon: 2}\n"
        "agent: {best_of_n_samples: 2, flow_steps: 1, critic: {num_critics: 2, hidden_dims: [8]}}\n"
    )
    assert main(["plan", str(file), "--devices", "8", "--device_memory", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["local_batch"], found["fits"], found["advice"]) == (8, True, [])
    assert main(["plan", str(file), "--device_memory", "1KB"]) == 1
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parameters", "candidates", "nano pi0"])
def test_a_plan_is_near_what_a_run_takes(name):
    """Measured by the benchmark in a process of its own, on one device, with a program as a run compiles it."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(BENCHMARK), "--only", name, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[name]
    assert 0.75 <= found["planned_over_measured"] <= 1.25, found


@pytest.mark.slow
def test_a_full_size_plan():
    """DROID's on eight devices of 80 GB, by shapes: all of pi0's parameters, split evenly."""
    config = apply_config_overrides(presets.get_preset("droid"), {"fsdp_devices": 8})
    found = memory.plan(config, Machine(8, device_memory=80 * 10**9))
    assert 3.2e9 < found.trainable == found.parameters < 3.3e9
    assert found.local_batch == 8
    # the policy once, critics and their targets; Adam has two moments of what trains; a checkpoint has all of it whole
    whole = 4 * (found.parameters + 2 * found.critic_parameters)
    assert found.parameter_bytes == pytest.approx(whole / 8, rel=0.01)
    assert found.optimizer_bytes == pytest.approx(2 * 4 * (found.parameters + found.critic_parameters) / 8, rel=0.01)
    assert found.checkpoint_bytes == pytest.approx(8 * (found.parameter_bytes + found.optimizer_bytes), rel=0.01)
    assert found.activation_bytes > 10**9
    assert found.fits
    small = dataclasses.replace(found, machine=Machine(8, device_memory=24 * 10**9))
    assert not small.fits
    assert any("gradient_accumulation_steps 2" in line for line in memory.advice(config, small))
