"""The online phase in a simulator that costs nothing: in step with the learner, and overlapping with it."""

import dataclasses
import json
import shutil
import signal
import types
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.envs.test_custom import CAR

from acrlpd import deploy
from acrlpd.agents.config import AgentConfig
from acrlpd.cli import train as cli
from acrlpd.config import CollectConfig, DataConfig, EvalConfig, PolicyConfig, TrainConfig
from acrlpd.data.replay import ReplayJournal
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.vector import RolloutConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import ending, evaluations, finished, loading, setup
from acrlpd.training.evaluate import summarize
from acrlpd.training.faults import Interrupted
from acrlpd.training.guards import LOCK_FILE
from acrlpd.training.metrics import read_jsonl
from acrlpd.training.report import write_report
from acrlpd.training.run import Progress

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
    monkeypatch.setattr(evaluations, "evaluate", kill)
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


def give_evaluations(monkeypatch, *successes):
    """Evaluations find these shares of success, one after the other, the last for ever."""
    left = list(successes)

    def evaluate(agent, transform, environments, seeds, **options):
        share = left.pop(0) if len(left) > 1 else left[0]
        rollouts = [types.SimpleNamespace(success=k < share * 10, returns=-1.0, length=3) for k in range(10)]
        return summarize(rollouts), []

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    monkeypatch.setattr(evaluations, "save_rollouts", lambda path, rollouts: None)


def best_of(files):
    return json.loads(files.best.read_text()) if files.best.exists() else None


def test_the_best_is_one_whose_checkpoint_is_there(tmp_path, monkeypatch):
    evaluated = dataclasses.replace(CONFIG.eval, frequency=2)
    config = dataclasses.replace(
        CONFIG, run_dir=str(tmp_path), offline_steps=9, online_steps=0, eval=evaluated, save_frequency=3, max_to_keep=5
    )
    files = setup.run_files(config)
    give_evaluations(monkeypatch, 0.2, 0.5, 0.1, 0.9, 0.3)  # of steps 2, 4, 6, 8, and those after the phase
    trainer = setup.make_trainer(config)
    found, keep_as_best = [], trainer._saver.keep_as_best

    def kept(**score):
        keep_as_best(**score)
        found.append((best_of(files), (files.checkpoints / str(trainer.state.step) / "_CHECKPOINT_METADATA").exists()))

    monkeypatch.setattr(trainer._saver, "keep_as_best", kept)
    trainer.train()
    assert found == [({"step": step, "success": s}, True) for step, s in ((2, 0.2), (4, 0.5), (8, 0.9))]
    assert loading.locate_checkpoint(files.directory / "best") == (files.checkpoints, 8)
    assert loading.load_checkpoint(files.directory / "best").step == 8

    back = setup.make_trainer(config, resume=True, from_step=6)
    assert (back.progress.best_step, back.progress.best_step_success) == (4, 0.5)
    assert best_of(files) == {"step": 4, "success": 0.5}
    assert back.parts.checkpoints.keep == {4, 9}
    back.parts.lock.release()
    shutil.rmtree(files.checkpoints / "4")
    back = setup.make_trainer(config, resume=True)
    assert (back.progress.best_step, best_of(files)) == (None, None)


def test_the_policy_that_is_kept_is_the_one_that_is_reported_and_served(tmp_path, monkeypatch):
    """It is chosen on other seeds than those of its result."""
    progress = types.SimpleNamespace(**{"4": 0.5, "8": 0.9, "12": 0.9, "16": 0.2})
    seen = []

    def evaluate(agent, transform, environments, seeds, **options):
        step = int(agent.step)
        seen.append((step, options["mode"], seeds))
        share = getattr(progress, str(step), 0.1)
        rollouts = [
            types.SimpleNamespace(seed=seed, success=k < share * 10, returns=-1.0, length=3)
            for k, seed in zip(range(10), [*seeds] * 5, strict=False)
        ]
        return summarize(rollouts), rollouts

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    monkeypatch.setattr(evaluations, "save_rollouts", lambda path, rollouts: None)
    config = dataclasses.replace(
        CONFIG, run_dir=str(tmp_path), online_steps=32, eval=dataclasses.replace(CONFIG.eval, frequency=8)
    )
    trainer = setup.make_trainer(config)
    summary = trainer.train()
    files = setup.run_files(config)
    on_the_way, final = config.eval.progress_seeds, config.eval.final_seeds
    assert not set(on_the_way) & set(final)
    last = int(trainer.agent.step)
    assert seen[:3] == [(4, "greedy", on_the_way), (4, "bc", final), (4, "greedy", final)]
    assert [each for each in seen[3:] if each[2] == final] == [(12, "greedy", final)]  # of two as good, the later
    assert seen[-2] == (last, "greedy", on_the_way)  # the newest has its chance, too
    assert summary["phases"]["online"]["success"] == 0.9
    assert summary["best"] == {"step": 12, "success": 0.9}
    assert loading.load_checkpoint(files.directory).step == deploy.load_trained(files.directory).step == 12
    assert loading.load_checkpoint(files.checkpoints).step == last
    assert read_jsonl(files.metrics)[-1]["step"] == 12

    follower = deploy.Follower(files.directory, deploy.ActingOptions())
    assert follower.refresh() is None
    files.best.write_text(json.dumps({"step": last, "success": 1.0}))
    assert follower.refresh().metadata["acrlpd"]["step"] == last

    damaged = next(
        each for each in (files.checkpoints / str(last)).rglob("*") if each.is_file() and "params" in str(each)
    )
    damaged.write_bytes(b"")
    files.best.write_text(json.dumps({"step": last, "success": 1.0}))
    assert loading.load_checkpoint(files.directory).step < last  # told, and the newest that is whole is read


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
    give_evaluations(monkeypatch, 0.2, 0.4, 0.9, 0.1)  # of steps 2, 4, 6 (all of them after 5 are poisoned), ...
    trainer = setup.make_trainer(config)
    batch = trainer.loader.batch

    def poisoned(draw, **options):
        found = batch(draw, **options)
        return dataclasses.replace(found, rewards=found.rewards * np.nan) if 5 <= draw < 100 else found

    trainer.loader.batch = poisoned
    trainer.train()
    assert trainer.progress.rollbacks == 1
    evaluated = [each["step"] for each in read_jsonl(files.metrics) if "eval/success_rate" in each]
    assert evaluated.count(6) == 2  # the policy that reached this step again is another one
    assert (trainer.progress.best_step, best_of(files)) == (4, {"step": 4, "success": 0.4})
    assert 4 in trainer.parts.checkpoints.steps()


def test_going_back_to_a_step_sets_its_later_episodes_aside(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=40, save_frequency=10, max_to_keep=9)
    setup.make_trainer(config).train()
    files = setup.run_files(config)
    journal = ReplayJournal(files.replay)
    episodes = len(journal)
    plain = setup.make_trainer(config, resume=True)
    assert (len(plain.parts.interaction.journal), plain.progress.next_episode) == (episodes, episodes)
    plain.parts.lock.release()
    back = setup.make_trainer(config, resume=True, from_step=4)
    assert (len(back.parts.interaction.journal), back.progress.env_steps, back.progress.next_episode) == (0, 0, 0)
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


# ---- how a run ends, and what its counters say


def stopping_online(trainer, monkeypatch, updates):
    """Asks the trainer to stop when it has made so many updates."""
    update = trainer._update

    def updated(phase):
        update(phase)
        if trainer.state.step == updates:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "_update", updated)


def everything(files):
    """All that a run's folder holds, but for the lock, in which each process writes its name."""
    return {
        str(path.relative_to(files.directory)): path.read_bytes()
        for path in sorted(files.directory.rglob("*"))
        if path.is_file() and path != files.directory / LOCK_FILE
    }


def journal_steps(files):
    return sum(map(len, ReplayJournal(files.replay).load()))


def test_resuming_a_finished_run_changes_nothing(tmp_path, monkeypatch):
    """Its last episodes were cut off by its end: 50 steps are two whole episodes and ten steps of no use."""
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=50)
    first = setup.make_trainer(config).train()
    files = setup.run_files(config)
    assert (first["env_steps"], first["lost_steps"], journal_steps(files)) == (56, 0, 40)
    assert first["ended"] == {
        "reason": "finished",
        "text": "finished: 4 offline updates, 56 online steps of 50",
        "rule": None,
    }
    before = everything(files)
    for changed in (config, dataclasses.replace(config, log_frequency=1, online_steps=40)):
        assert finished.nothing_left(changed).text.startswith("finished: 4 offline updates, 56 online steps")
        assert setup.make_trainer(changed, resume=True).train() == first
    assert everything(files) == before

    longer = dataclasses.replace(config, online_steps=80)
    assert finished.nothing_left(longer) is None
    trainer = setup.make_trainer(longer, resume=True)
    assert (trainer.progress.env_steps, trainer.progress.lost_steps) == (56, 16)
    more = trainer.train()
    assert (more["env_steps"] - more["lost_steps"], more["updates"]) == (80, 4 + 40)
    assert more["env_steps"] == 56 + 40
    assert journal_steps(files) == 80


def test_a_stop_loses_the_steps_of_episodes_under_way_and_they_are_made_again(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=80)
    trainer = setup.make_trainer(config)
    stopping_online(trainer, monkeypatch, 4 + 28)
    with pytest.raises(Interrupted):
        trainer.train()
    files = setup.run_files(config)
    summary = json.loads(files.summary.read_text())
    assert (summary["env_steps"], summary["updates"], journal_steps(files)) == (56, 32, 40)
    assert summary["ended"]["reason"] == "interrupted"
    assert finished.nothing_left(config) is None
    resumed = setup.make_trainer(config, resume=True)
    assert (resumed.progress.env_steps, resumed.progress.lost_steps, resumed.progress.counted_steps) == (56, 16, 40)
    summary = resumed.train()
    assert (summary["env_steps"], summary["lost_steps"], summary["updates"]) == (96, 16, 4 + 40)
    assert journal_steps(files) == 80


@given(st.lists(st.integers(0, 50), max_size=6))
def test_steps_executed_never_become_fewer_and_those_that_count_are_the_journals(stops):
    """However often a run is stopped, with however much of its episodes in the journal."""
    progress, executed = Progress(), 0
    for steps in stops:
        progress.env_steps += steps
        executed += steps
        kept = progress.counted_steps * 2 // 3
        progress.count_from(kept)
        assert (progress.env_steps, progress.counted_steps) == (executed, kept)
    progress.count_from(executed + 7)  # episodes that ended after the checkpoint
    assert progress.counted_steps == executed + 7
    assert progress.env_steps >= executed + 7


@pytest.mark.parametrize(
    ("patience", "enough", "shares", "rule"),
    [
        (2, None, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], None),  # nothing counts before a first success
        (2, None, [0.0, 0.0, 0.0, 0.5, 0.5], None),
        (2, None, [0.0, 0.0, 0.0, 0.5, 0.5, 0.4], "early_stopping_patience"),
        (2, None, [0.5, 0.4, 0.6, 0.6, 0.7, 0.1], None),
        (9, 0.0, [0.0, 0.0], None),
        (9, 0.0, [0.0, 0.1], "early_stopping_success"),
        (9, 0.6, [0.1, 0.6], "early_stopping_success"),
    ],
)
def test_what_counts_towards_early_stopping(patience, enough, shares, rule):
    config = dataclasses.replace(CONFIG, early_stopping_patience=patience, early_stopping_success=enough)
    progress = Progress()
    for share in shares:
        assert ending.early_stop(config, progress) is None
        progress.count_online_evaluation(share)
    found = ending.early_stop(config, progress)
    assert (found and found.rule) == rule
    assert rule is None or rule in found.text


def test_a_run_that_stopped_early_says_why_and_goes_on_only_if_told_to(tmp_path, monkeypatch, capsys):
    give_evaluations(monkeypatch, *[0.0] * 2, 0.4, 0.4, 0.3)  # after the offline phase; then on the way
    config = dataclasses.replace(
        CONFIG,
        run_dir=str(tmp_path),
        online_steps=400,
        early_stopping_patience=2,
        eval=dataclasses.replace(CONFIG.eval, frequency=8),
    )
    first = setup.make_trainer(config).train()
    files = setup.run_files(config)
    assert first["ended"]["reason"] == "early stop"
    assert first["ended"]["rule"] == "early_stopping_patience"
    assert first["env_steps"] < 400
    text = first["ended"]["text"]
    assert "2 online evaluations after the best one (40%) were no better" in text
    assert f"This run {text}." in write_report(files.directory).read_text()
    before = everything(files)
    longer = dataclasses.replace(config, online_steps=800)
    assert setup.make_trainer(longer, resume=True).train() == first
    assert cli.run(longer, again="", resume=True, from_step=None, override=()) == 0
    assert f"{text}. Nothing is left to do, unless --early_stopping_patience is raised." in capsys.readouterr().out
    assert everything(files) == before
    patient = dataclasses.replace(config, early_stopping_patience=9, online_steps=first["env_steps"] + 40)
    assert setup.make_trainer(patient, resume=True).train()["ended"]["reason"] == "finished"


def test_a_crash_is_an_end_with_a_reason(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    trainer = setup.make_trainer(config)
    monkeypatch.setattr(trainer.parts.interaction.collector, "finish", lambda: {}["missing"])
    with pytest.raises(KeyError):
        trainer.train()
    ended = json.loads(setup.run_files(config).summary.read_text())["ended"]
    assert (ended["reason"], ended["rule"]) == ("crashed", None)
    assert "crashed at update 4 (KeyError: 'missing')" in ended["text"]
    assert "has not finished: it crashed" in write_report(setup.run_files(config).directory).read_text()


@pytest.mark.parametrize("damage", ["summary", "checkpoint", "journal", "episode"])
def test_a_finished_run_with_something_missing_is_not_called_whole(tmp_path, damage):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), online_steps=40)
    setup.make_trainer(config).train()
    files = setup.run_files(config)
    assert finished.nothing_left(config) is not None
    if damage == "summary":
        files.summary.write_text("{")
    elif damage == "checkpoint":
        shutil.rmtree(files.checkpoints / "24" / "acrlpd")
    elif damage == "journal":
        shutil.rmtree(files.replay)
    else:
        next(files.replay.glob("*.hdf5")).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert finished.nothing_left(config) is None
