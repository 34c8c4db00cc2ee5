"""A run that was stopped goes on as if nothing had happened."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from tests.training.conftest import make_episode

from acrlpd.data.replay import ReplayJournal
from acrlpd.presets import with_algorithm
from acrlpd.training import checkpoint, loading, setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.faults import Interrupted
from acrlpd.training.metrics import read_jsonl


def leaves(agent):
    return jax.tree.leaves(
        (agent.params, agent.target_critic, agent.opt_state, agent.frozen, agent.step, agent.q_scale)
    )


def assert_same_bits(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_resumed_offline_run_equals_the_uninterrupted_one_bit_for_bit(finished, copied_run):
    """As if it had been killed after step 4, in the middle of writing a line of the metrics."""
    files = setup.run_files(copied_run)
    shutil.rmtree(files.checkpoints / "8")
    whole = len(read_jsonl(files.metrics))
    with files.metrics.open("a") as file:
        file.write('{"step": 9, "pha')
    assert len(read_jsonl(files.metrics)) == whole
    resumed = setup.make_trainer(copied_run, resume=True)
    assert int(resumed.agent.step) == 4
    resumed.train()
    assert_same_bits(finished.agent, resumed.agent)
    assert [json.loads(line)["step"] for line in files.metrics.read_text().splitlines()] == [2, 4, 6, 8, 6, 8]


def test_a_run_with_an_implicit_target_resumes_bit_for_bit_and_acts(tiny_config):
    """Critics and V alone at first, then two updates a call; the checkpoint has V and its moments."""
    temperature = dataclasses.replace(tiny_config.agent.temperature, adaptive=False)
    agent = dataclasses.replace(tiny_config.agent, target="implicit", temperature=temperature, policy_ema_decay=0.5)
    config = dataclasses.replace(tiny_config, agent=agent, critic_alone_steps=2, updates_per_call=2)
    trainer = setup.make_trainer(config)
    assert trainer.loader.batch(0, critic_alone=True).next_actions is None
    trainer.train()
    records = read_jsonl(setup.run_files(config).metrics)
    for name in ("value_loss", "v_mean", "advantage_mean", "advantage_positive", "grad_norm/value"):
        assert np.isfinite([each[f"train/{name}"] for each in records]).all()
    shutil.rmtree(setup.run_files(config).checkpoints / "8")
    resumed = setup.make_trainer(config, resume=True)
    assert int(resumed.agent.step) == 4
    resumed.train()
    assert_same_bits(trainer.agent, resumed.agent)
    loaded = loading.load_checkpoint(setup.run_files(config).directory)
    assert_same_bits(trainer.agent, loaded.agent)
    seen, rng = trainer.loader.batch(0).observations, jax.random.key(5)
    np.testing.assert_array_equal(loaded.agent.sample_actions(seen, rng), trainer.agent.sample_actions(seen, rng))


def test_another_seed_is_another_run(finished, tiny_config):
    other = setup.make_trainer(dataclasses.replace(tiny_config, seed=finished.config.seed + 1))
    other.train()
    pairs = zip(leaves(finished.agent), leaves(other.agent), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_updates_two_in_a_call_end_where_single_ones_do(finished, tiny_config, tmp_path):
    """Log points, losses and parameters; and a moving average beside them is what a checkpoint gives to act."""
    agent = dataclasses.replace(tiny_config.agent, policy_ema_decay=0.5)
    trainer = setup.make_trainer(dataclasses.replace(tiny_config, agent=agent, updates_per_call=2))
    trainer.train()
    metrics = [read_jsonl(setup.run_files(each.config).metrics) for each in (finished, trainer)]
    for one, other in zip(*metrics, strict=True):
        assert one["step"] == other["step"]
        np.testing.assert_allclose(one["train/total_loss"], other["train/total_loss"], rtol=1e-3)
    for one, other in zip(*(jax.tree.leaves(each.agent.params) for each in (finished, trainer)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)

    loaded = loading.load_checkpoint(setup.run_files(trainer.config).directory)
    assert_same_bits(loaded.agent, trainer.agent)
    jax.tree.map(np.testing.assert_array_equal, loaded.agent.ema, trainer.agent.ema)
    with np.testing.assert_raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, trainer.agent.ema["policy"], trainer.agent.params["policy"])

    # earlier versions averaged the policy alone: the targets are the average that there is of the critics
    earlier = dataclasses.replace(trainer.agent, ema={"policy": trainer.agent.ema["policy"]})
    manager = ACRLPDCheckpointManager(tmp_path / "earlier", writer=True)
    manager.save(earlier, asset_id="acrlpd", norm_stats=trainer.norm_stats, run={"progress": {}})
    manager.wait()
    restored = manager.restore(trainer.agent).agent
    jax.tree.map(np.testing.assert_array_equal, restored.ema["critic"], trainer.agent.target_critic)
    jax.tree.map(np.testing.assert_array_equal, restored.ema["policy"], trainer.agent.ema["policy"])


def test_a_checkpoint_from_before_the_size_of_q_was_measured(finished, tmp_path, monkeypatch):
    split = checkpoint._split

    def without(agent):
        policy, rest = split(agent)
        return policy, {name: part for name, part in rest.items() if name != "q_scale"}

    manager = ACRLPDCheckpointManager(tmp_path / "earlier", writer=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_split", without)
        manager.save(finished.agent, asset_id="acrlpd", norm_stats=finished.norm_stats, run={"progress": {}})
        manager.wait()
    restored = manager.restore(finished.agent).agent
    assert float(finished.agent.q_scale) > 0
    assert float(restored.q_scale) == 0
    assert_same_bits(dataclasses.replace(restored, q_scale=finished.agent.q_scale), finished.agent)
    with pytest.raises(ValueError, match="Resume its run for some updates"):
        restored.with_extraction("guided")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bc", "qc-fql", "rlpd-ac"])
def test_the_trainer_takes_every_baseline(tiny_config, algorithm):
    config = with_algorithm(tiny_config, algorithm)
    trainer = setup.make_trainer(config)
    trainer.train()
    losses = [each["train/total_loss"] for each in read_jsonl(setup.run_files(config).metrics)]
    assert np.isfinite(losses).all()
    loaded = loading.load_checkpoint(setup.run_files(config).directory)
    seen = trainer.loader.batch(0).observations
    rng = jax.random.key(5)
    np.testing.assert_array_equal(loaded.agent.sample_actions(seen, rng), trainer.agent.sample_actions(seen, rng))


def test_a_signal_saves_the_step_under_way(finished, tiny_config, monkeypatch):
    trainer = setup.make_trainer(tiny_config)
    original = trainer.loader.batch

    def batch(step, **kind):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(step, **kind)

    monkeypatch.setattr(trainer.loader, "batch", batch)
    with pytest.raises(Interrupted, match="SIGINT: saved step 3"):
        trainer.train()
    resumed = setup.make_trainer(tiny_config, resume=True)
    assert int(resumed.agent.step) == 3
    resumed.train()
    assert_same_bits(finished.agent, resumed.agent)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_undo_the_first_ones_save(finished, tiny_config, monkeypatch, first, second):
    """Neither before the save begins nor while it is written."""
    trainer = setup.make_trainer(tiny_config)
    original, wait = trainer.loader.batch, trainer.parts.checkpoints.wait

    def batch(step, **kind):
        if step == 2:
            signal.raise_signal(first)
            signal.raise_signal(second)
        return original(step, **kind)

    def waiting():
        signal.raise_signal(second)
        wait()

    monkeypatch.setattr(trainer.loader, "batch", batch)
    monkeypatch.setattr(trainer.parts.checkpoints, "wait", waiting)
    before = [signal.getsignal(each) for each in (first, second)]
    with pytest.raises(Interrupted, match=f"{first.name}: saved step 3"):
        trainer.train()
    assert [signal.getsignal(each) for each in (first, second)] == before
    assert int(setup.make_trainer(tiny_config, resume=True).agent.step) == 3


ASKED = """
import signal, sys, time
from acrlpd.training import guards
guards.HELD_BACK_S = 0.2
with guards.stop_on_signal() as stop:
    for name in sys.argv[1:]:
        signal.raise_signal(getattr(signal, name))
        assert stop.signal_name == sys.argv[1]
        time.sleep(0.3)
print("went on")
"""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        (["SIGTERM", "SIGTERM", "SIGTERM"], 0),  # a scheduler, which has its own last word
        (["SIGINT", "SIGTERM"], 0),
        (["SIGTERM", "SIGINT"], -signal.SIGINT),
        (["SIGINT", "SIGINT"], -signal.SIGINT),
    ],
)
def test_a_later_ctrl_c_ends_at_once_and_says_so(signals, code):
    done = subprocess.run([sys.executable, "-c", ASKED, *signals], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert f"{signals[0]}: stops and saves. Ctrl-C after 0.2 s ends at once" in done.stderr
    assert ("Ctrl-C once more: ends at once" in done.stderr) == (code != 0)
    assert ("went on" in done.stdout) == (code == 0)


def test_existing_directory_is_refused(copied_run):
    with pytest.raises(ValueError, match="Use --resume to go on with it, --overwrite to delete it"):
        setup.make_trainer(copied_run)
    assert int(setup.make_trainer(copied_run, overwrite=True).agent.step) == 0


def test_resume_with_other_hyper_parameters_is_refused_with_the_difference(copied_run):
    other = dataclasses.replace(copied_run, agent=dataclasses.replace(copied_run.agent, discount=0.5))
    with pytest.raises(ValueError, match=r"agent\.discount: was 0\.99, now 0\.5"):
        setup.make_trainer(other, resume=True)
    setup.make_trainer(dataclasses.replace(copied_run, log_frequency=1), resume=True)  # reporting may change


def test_checkpoint_holds_the_policy_as_openpi_lays_it_out(finished):
    step = setup.run_files(finished.config).checkpoints / "8"
    assert (step / "assets" / "acrlpd" / "norm_stats.json").is_file()
    tree = json.loads((step / "params" / "_METADATA").read_text())["tree_metadata"]
    assert "('params', 'state_in', 'kernel', 'value')" in tree


def test_loaded_agent_acts_like_the_trained_one(finished):
    loaded = loading.load_checkpoint(setup.run_files(finished.config).directory)
    assert loaded.config == finished.config.with_critic_horizon(finished.config.critic_horizon)
    observation = finished.loader.batch(0).observations
    rng = jax.random.key(5)
    np.testing.assert_array_equal(
        finished.agent.sample_actions(observation, rng), loaded.agent.sample_actions(observation, rng)
    )


def test_an_agent_of_many_devices_loads_on_fewer(finished, monkeypatch):
    read_run = ACRLPDCheckpointManager.read_run

    def of_eight(self, step):
        run = read_run(self, step)
        return {**run, "config": {**run["config"], "fsdp_devices": 8}}

    monkeypatch.setattr(ACRLPDCheckpointManager, "read_run", of_eight)
    loaded = loading.load_checkpoint(setup.run_files(finished.config).directory)
    assert loaded.config.fsdp_devices == 8
    assert loaded.step == finished.agent.step


def test_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        loading.load_checkpoint(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        loading.load_checkpoint(tmp_path / "empty")


def test_resume_with_another_learning_rate_when_asked_and_from_an_older_step(copied_run, caplog):
    schedule = dataclasses.replace(copied_run.optimizers.policy.schedule, peak_lr=1e-6)
    policy = dataclasses.replace(copied_run.optimizers.policy, schedule=schedule)
    other = dataclasses.replace(copied_run, optimizers=dataclasses.replace(copied_run.optimizers, policy=policy))
    with pytest.raises(ValueError, match=r"peak_lr: was 2\.5e-05, now 1e-06"):
        setup.make_trainer(other, resume=True)
    trainer = setup.make_trainer(other, resume=True, override=("optimizers.*.schedule.*",), from_step=4)
    assert int(trainer.agent.step) == 4
    assert "peak_lr: was 2.5e-05, now 1e-06" in caplog.text
    assert trainer.parts.checkpoints.steps() == [4]


def test_resume_on_another_number_of_devices(copied_run, finished, monkeypatch):
    """Where the parameters lie is no part of what a run computes."""
    monkeypatch.setattr("acrlpd.training.sharding.MIN_SHARDED_BYTES", 1)
    trainer = setup.make_trainer(dataclasses.replace(copied_run, fsdp_devices=2), resume=True)
    found, expected = jax.tree.leaves(trainer.agent.params), jax.tree.leaves(finished.agent.params)
    assert any(not leaf.is_fully_replicated for leaf in found)
    assert all(leaf.is_fully_replicated for leaf in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_which_checkpoints_stay(tiny_config):
    config = dataclasses.replace(tiny_config, save_frequency=1, max_to_keep=1, keep_period=3)
    trainer = setup.make_trainer(config)
    trainer.train()
    assert trainer.parts.checkpoints.steps() == [3, 6, 8]


def test_a_step_that_is_not_there_or_damaged_costs_no_checkpoint(copied_run):
    files = setup.run_files(copied_run)
    with pytest.raises(ValueError, match=r"no checkpoint of step 2; there are \[4, 8\]"):
        setup.make_trainer(copied_run, resume=True, from_step=2)
    (files.checkpoints / "4" / "assets" / "acrlpd" / "norm_stats.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoints/4 is damaged: .*\n?.*the other steps there are: \[8\]"):
        setup.make_trainer(copied_run, resume=True, from_step=4)
    assert int(setup.make_trainer(copied_run, resume=True).agent.step) == 8
    assert (files.checkpoints / "4").is_dir()


@pytest.mark.parametrize("damage", ["{", "other numbers"])
def test_damaged_statistics_are_a_damaged_checkpoint(finished, copied_run, damage):
    file = setup.run_files(copied_run).checkpoints / "8" / "assets" / "acrlpd" / "norm_stats.json"
    if damage == "other numbers":
        content = json.loads(file.read_text())
        content["norm_stats"]["state"]["mean"][0] += 1.0
        damage = json.dumps(content)
    file.write_text(damage)
    resumed = setup.make_trainer(copied_run, resume=True)
    assert int(resumed.agent.step) == 4
    np.testing.assert_array_equal(resumed.norm_stats["state"].mean, finished.norm_stats["state"].mean)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(copied_run):
    files = setup.run_files(copied_run)
    for step in ("4", "8"):
        shutil.rmtree(files.checkpoints / step / "params")
    with pytest.raises(ValueError, match=r"no checkpoint that can be read\. Those set aside lie in .*damaged"):
        setup.make_trainer(copied_run, resume=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged ones \(4, 8\) in .*use --resume; or .*--overwrite"):
            setup.make_trainer(copied_run, resume=True)


def test_a_run_that_has_lost_its_checkpoints_but_not_its_episodes_does_not_start_over(copied_run, caplog):
    files = setup.run_files(copied_run)
    shutil.rmtree(files.checkpoints)
    assert int(setup.make_trainer(copied_run, resume=True).agent.step) == 0  # as if killed before the first checkpoint
    ReplayJournal(files.replay).append(make_episode(np.random.default_rng(0), 5, success=True))
    with pytest.raises(ValueError, match=r"no checkpoint to resume from, but 1 episodes in .*replay"):
        setup.make_trainer(copied_run, resume=True)
    online_alone = dataclasses.replace(copied_run, offline_steps=0)
    assert int(setup.make_trainer(online_alone, resume=True, override="*").agent.step) == 0
    assert "starting at step 0 with the 1 episodes" in caplog.text
