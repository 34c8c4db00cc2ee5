"""A run that was stopped goes on as if nothing had happened."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from acrlpd.training import setup
from acrlpd.training.guards import Interrupted, stop_on_signal
from acrlpd.training.metrics import read_jsonl


def leaves(agent):
    return jax.tree.leaves((agent.params, agent.target_critic, agent.opt_state, agent.frozen, agent.step))


def assert_same_bits(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_resumed_offline_run_equals_the_uninterrupted_one_bit_for_bit(tiny_config):
    straight = setup.make_trainer(tiny_config)
    straight.train()
    shutil.rmtree(setup.run_files(tiny_config).checkpoints / "8")  # as if it had been killed after step 4
    resumed = setup.make_trainer(tiny_config, resume=True)
    assert int(resumed.agent.step) == 4
    resumed.train()
    assert_same_bits(straight.agent, resumed.agent)


def test_two_seeds_differ_and_one_seed_repeats(tiny_config):
    agents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = setup.make_trainer(dataclasses.replace(tiny_config, name=name, seed=seed))
        trainer.train()
        agents.append(trainer.agent)
    assert_same_bits(agents[0], agents[1])
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(leaves(agents[0]), leaves(agents[2]), strict=True)
    )


def test_a_signal_saves_the_step_under_way(tiny_config, monkeypatch):
    trainer = setup.make_trainer(tiny_config)
    original = trainer.loader.batch

    def batch(step, *, online=False):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(step, online=online)

    monkeypatch.setattr(trainer.loader, "batch", batch)
    with pytest.raises(Interrupted, match="SIGINT: saved step 3"):
        trainer.train()
    resumed = setup.make_trainer(tiny_config, resume=True)
    assert int(resumed.agent.step) == 3
    resumed.train()
    straight = setup.make_trainer(dataclasses.replace(tiny_config, name="straight"))
    straight.train()
    assert_same_bits(straight.agent, resumed.agent)


def test_a_second_signal_is_not_held_back():
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_existing_directory_is_refused(tiny_config):
    setup.make_trainer(tiny_config).train()
    with pytest.raises(ValueError, match="Use --resume to go on with it, --overwrite to delete it"):
        setup.make_trainer(tiny_config)
    assert int(setup.make_trainer(tiny_config, overwrite=True).agent.step) == 0


def test_resume_with_other_hyper_parameters_is_refused_with_the_difference(tiny_config):
    setup.make_trainer(tiny_config).train()
    other = dataclasses.replace(tiny_config, agent=dataclasses.replace(tiny_config.agent, discount=0.5))
    with pytest.raises(ValueError, match=r"agent\.discount: was 0\.99, now 0\.5"):
        setup.make_trainer(other, resume=True)
    setup.make_trainer(dataclasses.replace(tiny_config, log_frequency=1), resume=True)  # reporting may change


def test_a_damaged_tail_of_the_metrics_is_dropped(tiny_config):
    setup.make_trainer(tiny_config).train()
    path = setup.run_files(tiny_config).metrics
    whole = len(read_jsonl(path))
    with path.open("a") as file:
        file.write('{"step": 9, "pha')
    assert len(read_jsonl(path)) == whole
    shutil.rmtree(setup.run_files(tiny_config).checkpoints / "8")
    setup.make_trainer(tiny_config, resume=True).train()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6, 8, 6, 8]


def test_checkpoint_holds_the_policy_as_openpi_lays_it_out(tiny_config):
    setup.make_trainer(tiny_config).train()
    step = setup.run_files(tiny_config).checkpoints / "8"
    assert (step / "assets" / "acrlpd" / "norm_stats.json").is_file()
    tree = json.loads((step / "params" / "_METADATA").read_text())["tree_metadata"]
    assert "('params', 'state_in', 'kernel', 'value')" in tree


def test_loaded_agent_acts_like_the_trained_one(tiny_config):
    trainer = setup.make_trainer(tiny_config)
    trainer.train()
    loaded = setup.load_checkpoint(setup.run_files(tiny_config).directory)
    assert loaded.config == tiny_config
    observation = trainer.loader.batch(0).observations
    rng = jax.random.key(5)
    np.testing.assert_array_equal(
        trainer.agent.sample_actions(observation, rng), loaded.agent.sample_actions(observation, rng)
    )


def test_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        setup.load_checkpoint(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        setup.load_checkpoint(tmp_path / "empty")
