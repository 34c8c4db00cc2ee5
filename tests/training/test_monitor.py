"""What a run's numbers say, and who else gets them."""

import functools
import json
import math
import shutil
import sqlite3
import sys
import types

import pytest

from acrlpd import platforms, presets
from acrlpd.config import LoggerConfig
from acrlpd.training.monitor import BASELINE_POINTS, TREND_POINTS, ACRLPDDebugger, ACRLPDTrainingMonitor
from acrlpd.training.writers import WANDB_METRIC_GROUPS, make_writers, numbers

HEALTHY = {
    "train/total_loss": 2.0,
    "train/critic_loss": 1.0,
    "train/bc_loss": 1.0,
    "train/q_std": 0.5,
    "train/td_error_mean": 0.4,
    "train/alpha_value": 0.5,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"train/total_loss": 30.0}, "ten times"),
        ({"train/q_std": 0.001}, "all Q values are the same"),
        ({"train/bc_loss": 200.0}, "reduce agent.loss_weights.bc_weight"),
        ({"train/bc_loss": 1e-5}, "increase agent.loss_weights.bc_weight"),
        ({"train/alpha_value": 11.0}, "temperature"),
        ({"train/skipped": 0.5}, "skipped_updates.jsonl"),
    ],
)
def test_anomalies(change, words, caplog):
    monitor = ACRLPDTrainingMonitor()
    for step in range(BASELINE_POINTS):
        assert monitor.monitor_training_step(step, HEALTHY) == []
    found = monitor.monitor_training_step(9, HEALTHY | change)
    assert len(found) == (words is not None)
    assert all(words in text for text in found)
    monitor.monitor_training_step(10, HEALTHY | change)
    assert len(caplog.records) == len(found)  # told once


@pytest.mark.parametrize(
    ("offline", "online", "warns"),
    [
        ("1111111111", "1111000000", True),  # six lost, none won: p = 0.03
        ("1111111111", "1111100000", False),  # five lost: p = 0.06
        ("1111111100", "1100000011", False),  # six lost, two won: p = 0.29
        ("0000000000", "1111111111", False),  # better
        ("", "0000000000", False),  # a run without an offline phase
    ],
)
def test_an_online_policy_below_the_offline_one_is_told(offline, online, warns, caplog):
    def by_seed(outcomes):
        return {str(1_500_000 + place): each == "1" for place, each in enumerate(outcomes)}

    found = ACRLPDTrainingMonitor().monitor_evaluation(7, by_seed(offline), by_seed(online))
    assert (found is not None) == warns
    assert [record.getMessage() for record in caplog.records] == ([f"step 7: {found}"] if warns else [])
    if found:
        assert "solves 4 of 10 episodes, the offline one solved 10 of the same" in found
        assert "p = 0.031" in found
        assert "data.online_ratio_episodes" in found


def test_learning_rate_suggestions():
    monitor = ACRLPDTrainingMonitor()
    assert monitor.suggest_lr_adjustment() is None
    for step in range(TREND_POINTS):
        monitor.monitor_training_step(step, HEALTHY)
    assert "has not moved" in monitor.suggest_lr_adjustment()
    for step in range(TREND_POINTS // 2):
        monitor.monitor_training_step(step, HEALTHY | {"train/critic_loss": 2.0})
    assert "rose by 100%" in monitor.suggest_lr_adjustment()


def test_a_report_about_a_run(finished):
    report = ACRLPDDebugger(finished.parts.files.directory).generate_training_report()
    assert "## Q values\n- q_mean: " in report
    assert "not logged" not in report


def test_the_groups_name_what_is_logged(finished):
    logged = set(finished._log.monitor.history.metrics)
    missing = {
        name for group, names in WANDB_METRIC_GROUPS.items() for name in names if group != "evaluation_performance"
    }
    assert missing - logged <= {"memory/gpu_usage"}  # this device does not count its bytes


def test_tuning_runs_cover_a_phase():
    runs = platforms.tuning_runs(presets.get_preset("demo"), "phase_2_critic_architecture")
    assert len(runs) == 15 == len({(run.agent.critic.num_critics, run.agent.critic.hidden_dims) for run in runs})
    assert {run.offline_steps for run in runs} == {100_000}
    with pytest.raises(ValueError, match="unknown phase"):
        platforms.tuning_runs(presets.get_preset("demo"), "phase_9")


def test_only_finite_numbers_are_drawn():
    record = {"step": 3, "phase": "offline", "train/a": 1, "train/b": math.nan, "eval/c": 0.5}
    assert numbers(record) == {"train/a": 1.0, "eval/c": 0.5}


def written(tmp_path, kind, **options):
    writers = make_writers(tmp_path / "m.jsonl", LoggerConfig((kind,), **options), name="job", run_config={"seed": 1})
    for step in (1, 2):
        writers.write({"step": step, "phase": "offline", "train/total_loss": 0.5 * step})
    writers.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total_loss")] == [(1, 0.5), (2, 1.0)]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    written(tmp_path, "wandb", wandb_mode="offline")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_wandb_run_belongs_to_one_start_of_one_folder(tmp_path, monkeypatch):
    ids = []
    run = types.SimpleNamespace(define_metric=lambda *what, **how: None, finish=lambda: None)
    init = lambda **options: ids.append(options["id"]) or run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))

    def begin(folder):
        config = LoggerConfig(("wandb",), project="mine/too")
        make_writers(tmp_path / folder / "m.jsonl", config, name="job", run_config={}).close()

    begin("a")
    begin("a")  # resumed
    begin("b")  # the same name in another folder
    shutil.rmtree(tmp_path / "a")
    begin("a")  # --overwrite
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(each.startswith("mine-too-job-") for each in ids)


def test_trackio_is_told_every_step(tmp_path, monkeypatch):
    told = []
    calls = {name: functools.partial(lambda *what, **how: told.append((*what, how)), name) for name in TRACKIO}
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(**calls))
    written(tmp_path, "trackio", project="mine")
    assert told == [
        ("init", {"project": "mine", "name": "job", "config": {"seed": 1}, "resume": "allow"}),
        ("log", {"train/total_loss": 0.5}, {"step": 1}),
        ("log", {"train/total_loss": 1.0}, {"step": 2}),
        ("finish", {}),
    ]


TRACKIO = ("init", "log", "finish")


def test_trackios_data_base_has_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip("trackio")
    written(tmp_path, "trackio", project="mine")
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as found:
        rows = found.execute("select run_name, step, metrics from metrics order by step").fetchall()
    values = [(name, step, json.loads(metrics)["train/total_loss"]) for name, step, metrics in rows]
    assert values == [("job", 1, 0.5), ("job", 2, 1.0)]


def test_a_missing_logger_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[trackio\]'"):
        make_writers(tmp_path / "m.jsonl", LoggerConfig(("trackio",)), name="job", run_config={})
