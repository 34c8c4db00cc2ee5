"""The command line as a person meets it: help, typing mistakes, and a whole run with a kill in the middle."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acrlpd.cli.main import EXIT_BROKEN_PIPE, main
from acrlpd.data.view.robots import mapping
from acrlpd.presets import get_preset, with_algorithm
from acrlpd.training.faults import EXIT_INTERRUPTED


def test_usage_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["help"], ["-h"], ["help", "list"], ["list"]])
def test_help_is_there_in_every_way_that_people_ask(words, capsys):
    assert main(words) == (2 if words == ["list"] else 0)  # without a name it is a mistake, which the usage answers
    assert "usage: acrlpd" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_version_is_the_packages(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"acrlpd {importlib.metadata.version('acrlpd')}\n"


def test_every_listed_name_is_taken(capsys):
    def listed(*words):
        assert main(["list", *words]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    assert {"demo", "droid"} <= {get_preset(name).preset for name in listed("presets")}
    assert {"acrlpd", "qc"} <= {name for name in listed("algorithms") if with_algorithm(get_preset("demo"), name)}
    assert set(listed("robots")) == set(mapping.ROBOTS)
    assert {"metaworld", "aloha", "custom"} <= set(listed("environments"))
    assert "aloha/transfer_cube" in listed("environments", "aloha")
    assert main(["list", "environments", "alhoa"]) == 2
    assert "there are metaworld" in capsys.readouterr().err


def test_a_reader_who_leaves_early_is_no_error(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert main(["list", "robots"]) == EXIT_BROKEN_PIPE
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "dmeo"], "did you mean 'demo'"),
        (["eval", "--checkpoint", "no/such/folder"], "is not a folder"),
        (["train", "demo", "--env.name", "metaworld/drawer-opn-v3", "--run_dir", "{tmp}"], "metaworld/drawer-open-v3"),
        (["train", "demo", "--execute_horizon", "9", "--run_dir", "{tmp}"], "cannot execute more steps"),
    ],
)
def test_a_mistake_gets_the_nearest_valid_word(arguments, hint, capsys, tmp_path):
    try:
        code = main([argument.format(tmp=tmp_path) for argument in arguments])
    except SystemExit as stop:  # the flag parser's own way out
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert hint in " ".join((captured.err + captured.out).split())


def test_a_traceback_for_who_asks(monkeypatch, capsys):
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("ACRLPD_DEBUG", value)
        assert main(["train", "--resume", "nowhere"]) == 2
        errors = capsys.readouterr().err
        assert "acrlpd: --resume nowhere: no run there" in errors
        assert ("Traceback" in errors) == expected


def test_help_of_a_preset_shows_fields_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo", "--help"])
    assert stop.value.code == 0
    assert "updates per environment step" in " ".join(capsys.readouterr().out.split())


FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # made faster, and slower


def acrlpd(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": FLAGS}  # one device, as a user has
    command = [sys.executable, "-m", "acrlpd.cli.main", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_train_kill_resume_interrupt_resume_eval(tmp_path):
    run = tmp_path / "debug"
    flags = ("train", "debug", "--run_dir", str(tmp_path))

    killed = acrlpd(*flags)
    wait_for(killed, run / "checkpoints" / "10" / "params")
    killed.kill()
    killed.communicate()

    interrupted = acrlpd(*flags, "--resume")
    wait_for(interrupted, run / "replay" / "journal.jsonl")  # the first online episode is finished
    interrupted.send_signal(signal.SIGINT)
    errors = interrupted.communicate(timeout=300)[1]
    assert interrupted.returncode == EXIT_INTERRUPTED, errors
    assert f"acrlpd train debug --run_dir {tmp_path} --resume" in errors

    resumed = acrlpd(*flags, "--resume")
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["phases"]) == {"bc", "offline", "online"}
    assert summary["env_steps"] >= 60
    assert summary["updates"] >= 20 + 60 - 5
    journal = [json.loads(line) for line in (run / "replay" / "journal.jsonl").read_text().splitlines()]
    assert [entry["number"] for entry in journal] == list(range(len(journal)))
    assert (run / "report.html").stat().st_size > 10_000
    assert str(run / "report.html") in output

    first = run / "checkpoints" / "20"
    small = ("--protocol.observation_noise", "0.1", "--protocol.action_noise", "0.1", "--protocol.best_of_n", "2")
    evaluated = acrlpd(
        *("eval", "--checkpoint", str(run), "--compare", str(first), "--episodes", "2", "--json", "--full", *small)
    )
    output, errors = evaluated.communicate(timeout=300)
    assert evaluated.returncode == 0, errors
    found = json.loads(output)
    assert found["episodes"] == 2
    task = found["tasks"]["metaworld/drawer-open-v3"]
    assert (task["comparison"]["episodes"], task["best_of_n"]["2"]["episodes"]) == (2, 2)
    assert json.loads((run / "evaluations" / "full.json").read_text()) == found
