"""The online phase in a simulator that costs nothing: in step with the learner, and overlapping with it."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from tests.envs.test_custom import CAR

from acrlpd.agents.acrlpd import AgentConfig
from acrlpd.config import CollectConfig, DataConfig, EvalConfig, PolicyConfig, TrainConfig
from acrlpd.data.replay import ReplayJournal
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.vector import RolloutConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import loop, setup
from acrlpd.training.evaluate import summarize
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


def test_a_kill_in_the_evaluation_after_a_phase_costs_no_update(tmp_path, monkeypatch):
    """And the results are stored beside the checkpoint that was written before it."""

    class Killed(BaseException):
        pass

    def kill(*what, **how):
        raise Killed

    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=0)
    monkeypatch.setattr(loop, "evaluate", kill)
    with pytest.raises(Killed):
        setup.make_trainer(config).train()
    monkeypatch.undo()
    resumed = setup.make_trainer(config, resume=True)
    assert (int(resumed.agent.step), resumed.progress.finished) == (4, [])
    summary = resumed.train()
    again = setup.make_trainer(config, resume=True)
    assert again.progress.finished == ["offline"]
    assert again.progress.results == summary["phases"]
    assert set(summary["phases"]) == {"bc", "offline"}


def evaluations(monkeypatch, *successes):
    """Evaluations find these shares of success, one after the other, the last for ever."""
    left = list(successes)

    def evaluate(agent, transform, environments, seeds, **options):
        share = left.pop(0) if len(left) > 1 else left[0]
        rollouts = [types.SimpleNamespace(success=k < share * 10, returns=-1.0, length=3) for k in range(10)]
        return summarize(rollouts), []

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "save_rollouts", lambda path, rollouts: None)


def best_of(files):
    return json.loads(files.best.read_text()) if files.best.exists() else None


def test_the_best_is_one_whose_checkpoint_is_there(tmp_path, monkeypatch):
    evaluated = dataclasses.replace(CONFIG.eval, frequency=2)
    config = dataclasses.replace(
        CONFIG, run_dir=str(tmp_path), offline_steps=9, online_steps=0, eval=evaluated, save_frequency=3, max_to_keep=5
    )
    files = setup.run_files(config)
    evaluations(monkeypatch, 0.2, 0.5, 0.1, 0.9, 0.3)  # of steps 2, 4, 6, 8, and those after the phase
    trainer = setup.make_trainer(config)
    found, keep_as_best = [], trainer._keep_as_best

    def kept(success):
        keep_as_best(success)
        found.append((best_of(files), (files.checkpoints / str(trainer._step) / "_CHECKPOINT_METADATA").exists()))

    monkeypatch.setattr(trainer, "_keep_as_best", kept)
    trainer.train()
    assert found == [({"step": step, "success": s}, True) for step, s in ((2, 0.2), (4, 0.5), (8, 0.9))]
    assert setup.locate_checkpoint(files.directory / "best") == (files.checkpoints, 8)
    assert setup.load_checkpoint(files.directory / "best").step == 8

    back = setup.make_trainer(config, resume=True, from_step=6)
    assert (back.progress.best_step, back.progress.best_step_success) == (4, 0.5)
    assert best_of(files) == {"step": 4, "success": 0.5}
    assert back._checkpoints.keep == {4, 9}
    back._lock.release()
    shutil.rmtree(files.checkpoints / "4")
    back = setup.make_trainer(config, resume=True)
    assert (back.progress.best_step, best_of(files)) == (None, None)


def test_a_rollback_goes_back_to_the_best_before_it(tmp_path, monkeypatch):
    evaluated = dataclasses.replace(CONFIG.eval, frequency=2)
    config = dataclasses.replace(
        CONFIG,
        run_dir=str(tmp_path),
        offline_steps=12,
        online_steps=0,
        eval=evaluated,
        save_frequency=5,
        max_skipped_updates=2,
    )
    files = setup.run_files(config)
    evaluations(monkeypatch, 0.2, 0.4, 0.9, 0.1)  # of steps 2, 4, 6 (all of them after 5 are poisoned), ...
    trainer = setup.make_trainer(config)
    batch = trainer.loader.batch

    def poisoned(draw, **options):
        found = batch(draw, **options)
        return dataclasses.replace(found, rewards=found.rewards * np.nan) if 5 <= draw < 100 else found

    trainer.loader.batch = poisoned
    trainer.train()
    assert trainer.progress.rollbacks == 1
    assert (trainer.progress.best_step, best_of(files)) == (4, {"step": 4, "success": 0.4})
    assert 4 in trainer._checkpoints.steps()


def test_going_back_to_a_step_sets_its_later_episodes_aside(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=40, save_frequency=10, max_to_keep=9)
    setup.make_trainer(config).train()
    files = setup.run_files(config)
    journal = ReplayJournal(files.replay)
    episodes = len(journal)
    plain = setup.make_trainer(config, resume=True)
    assert (len(plain._interaction.journal), plain.progress.next_episode) == (episodes, episodes)
    plain._lock.release()
    back = setup.make_trainer(config, resume=True, from_step=4)
    assert (len(back._interaction.journal), back.progress.env_steps, back.progress.next_episode) == (0, 0, 0)
    assert len(list((files.replay / "later").iterdir())) == episodes > 0
    assert f"{episodes} episodes of later steps were set aside" in caplog.text
    back.train()
    assert len(ReplayJournal(files.replay)) > 0


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
