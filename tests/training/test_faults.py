"""What may happen to a run, and what is left of it. ``ACRLPD_FAULTS``: how often jobs are killed (make test-faults).

The jobs are ``fault_job.py``'s. A run has 30 offline updates, then 40 steps of its own in a toy world, and a checkpoint
every 10 updates; the others collect episodes, and evaluate and export what a run has learned.
"""

import dataclasses
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.data.formats import hdf5
from acrlpd.models import weights
from acrlpd.training import loading, run_log, setup
from acrlpd.training.checkpoint import DamagedCheckpoint
from acrlpd.training.faults import EXIT_FAULT, EXIT_INTERRUPTED, DataFault, Diverged, RunFault
from acrlpd.training.guards import RunLock, explain_storage
from acrlpd.training.metrics import read_jsonl

JOB = Path(__file__).with_name("fault_job.py")
OFFLINE_STEPS = "30"
KILLS = int(os.environ.get("ACRLPD_FAULTS", "10"))
SHARES = {"train": 0.4, "train-with-workers": 0.2, "collect": 0.2, "evaluate": 0.1, "export": 0.1}
KINDS = ("save", "journal-file", "random", "journal-line", "random", "save")


def start(run_dir, fault="", devices=1, work="train"):
    run_dir.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        f" --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(run_dir.parent / "xla"),  # a job is started often, and compiles once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(JOB), str(run_dir), fault, work]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def wait_for_work(process):
    """A job that resumes at the end of a phase evaluates first, and says so."""
    lines = iter(process.stdout.readline, "")
    assert "at work\n" in lines, process.communicate()[1]


def kill_while_saving(process, run_dir):
    """At the next sight of a checkpoint that is not complete; a job that ends first was not killed."""
    while process.poll() is None:
        if any("tmp" in path.name for path in (run_dir / "job" / "checkpoints").iterdir()):
            process.kill()
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nothing happened to, and the seconds its training took."""
    run_dir = tmp_path_factory.mktemp("whole")
    process = start(run_dir)
    wait_for_work(process)
    started = time.monotonic()
    code, errors = finish(process)
    assert code == 0, errors
    return run_dir, time.monotonic() - started


def check(run_dir, reference):
    jax.tree.map(np.testing.assert_array_equal, arrays(run_dir), arrays(reference))
    journal = read_jsonl(run_dir / "job" / "replay" / "journal.jsonl")
    assert len({entry["number"] for entry in journal}) == len(journal)
    numbers = [entry["episode"] for entry in setup.ReplayJournal(run_dir / "job" / "replay").metadata()]
    assert len(set(numbers)) == len(numbers), "an episode is there twice"
    noted = run_dir / "used.jsonl"  # absent where every process was killed before it noted its first
    used = [int(line) for line in noted.read_text().split()] if noted.exists() else []
    assert set(used) <= set(numbers), "an episode was used and is gone"
    assert sum(entry["length"] for entry in journal) >= 40 - 2 * 10
    assert max(numbers) - min(numbers) < len(numbers) + 2, "episodes are missing in between"


def arrays(run_dir):
    checkpoints = run_dir / "job" / "checkpoints"
    policy = weights.read_params(str(checkpoints / OFFLINE_STEPS / "params"))
    run = json.loads(next((checkpoints / OFFLINE_STEPS / "run").glob("metadata*")).read_text())
    return policy, run["checksums"]


def kill_often(work, kills, seconds, make_folder, verify):
    """Starts ``work`` and kills it, in one folder until it has come to its end, then in the next."""
    moments = random.Random(work)
    kinds = itertools.cycle(KINDS if work.startswith("train") else ("random",))
    killed, run_dir, finished = 0, make_folder(), 0
    while killed < kills or finished == 0:
        kind = next(kinds) if killed < kills else ""
        process = start(run_dir, kind if kind.startswith("journal") else "", work=work)
        wait_for_work(process)
        if kind == "random":
            time.sleep(moments.uniform(0, seconds))
            process.kill()
        elif kind == "save":
            kill_while_saving(process, run_dir)
        code, errors = finish(process)
        assert code in (0, -signal.SIGKILL), errors
        killed += code != 0
        if code == 0:
            verify(run_dir)
            run_dir, finished = make_folder(), finished + 1


def kills_of(work):
    return max(1, round(KILLS * SHARES[work]))


@pytest.fixture
def make_folder(tmp_path):
    numbers = itertools.count()
    return lambda: tmp_path / f"run-{next(numbers)}"


@pytest.mark.slow
@pytest.mark.timeout(200 * max(KILLS, 6))
@pytest.mark.parametrize("work", ["train", "train-with-workers"])
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(uninterrupted, make_folder, work):
    reference, seconds = uninterrupted
    kill_often(work, kills_of(work), seconds, make_folder, lambda run_dir: check(run_dir, reference))


@pytest.mark.slow
@pytest.mark.timeout(200 * max(KILLS, 6))
@pytest.mark.parametrize("work", ["collect", "evaluate", "export"])
def test_other_work_killed_at_any_moment_can_be_done_again(uninterrupted, tmp_path, make_folder, work):
    """It ends with what it makes undisturbed, leaves nothing half done beside it, and its run as it was."""
    run, _ = uninterrupted

    def copied():
        folder = make_folder()
        shutil.copytree(run / "job", folder / "job")
        return folder

    def timed():
        folder = copied()
        process = start(folder, work=work)
        wait_for_work(process)
        started = time.monotonic()
        code, errors = finish(process)
        assert code == 0, errors
        return folder, time.monotonic() - started

    reference, seconds = timed()

    def verify(folder):
        jax.tree.map(np.testing.assert_array_equal, MADE[work](folder), MADE[work](reference))
        assert not [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]
        for path in (run / "job").rglob("*"):
            if path.is_file():
                assert (folder / path.relative_to(run)).read_bytes() == path.read_bytes()

    kill_often(work, kills_of(work), seconds, copied, verify)


def collected(folder):
    paths = sorted((folder / "collected").iterdir())
    episodes = {path.name: hdf5.read_episode(path) for path in paths}
    return {name: (each.state, each.actions, each.rewards, each.terminals) for name, each in episodes.items()}


def exported(folder):
    step = next(path for path in (folder / "export").iterdir() if path.name.isdigit())
    functions = {path.name: path.read_bytes() for path in (folder / "export" / "stablehlo").iterdir()}
    return weights.read_params(str(step / "params")), functions


def evaluated(folder):
    found = json.loads((folder / "evaluation.json").read_text())
    return {name: json.dumps(value) for name, value in found.items() if name != "checkpoint"}


MADE = {"collect": collected, "evaluate": evaluated, "export": exported}


@pytest.mark.slow
def test_sigterm_and_a_full_disk_leave_a_run_that_goes_on(uninterrupted, tmp_path):
    reference, _ = uninterrupted
    full = start(tmp_path, "disk-full")
    code, errors = finish(full)
    assert code == EXIT_FAULT, errors
    assert "make room" in errors.lower()
    assert "--resume" in errors
    assert "Traceback" not in errors  # Orbax has one for each of its threads
    steps = [int(path.name) for path in (tmp_path / "job" / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) in (10, 20)  # the save of step 20 may still be under way when the disk is full
    asked = start(tmp_path)
    wait_for_work(asked)
    asked.send_signal(signal.SIGTERM)
    code, errors = finish(asked)
    assert code == EXIT_INTERRUPTED, errors
    code, errors = finish(start(tmp_path))
    assert code == 0, errors
    check(tmp_path, reference)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(uninterrupted, tmp_path):
    """From 1 to 4 and back, at the end of the offline phase: what was saved is read bit by bit, whoever reads it."""
    whole, _ = uninterrupted
    reference = arrays(whole)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "job" / "checkpoints"
    for devices in (4, 2, 1):
        for path in checkpoints.iterdir():
            if path.name.isdigit() and int(path.name) > int(OFFLINE_STEPS):
                shutil.rmtree(path)  # so that the whole online phase is left to do
        code, errors = finish(start(tmp_path, devices=devices))
        assert code == 0, errors
        assert f"resumed at update {OFFLINE_STEPS}" in errors
        jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), reference)


def test_a_damaged_newest_checkpoint_is_moved_away_loudly(finished, copied_run, caplog):
    checkpoints = setup.run_files(copied_run).checkpoints
    shutil.copytree(checkpoints / "8", checkpoints / "6")
    shutil.rmtree(checkpoints / "6" / "acrlpd")
    for file in (checkpoints / "8").rglob("*"):  # one byte of the parameters is another
        if file.is_file() and file.parent.name == "d" and "params" in file.parts:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    resumed = setup.make_trainer(copied_run, resume=True)
    assert int(resumed.agent.step) == 4
    assert caplog.text.count("Falling back to the checkpoint before it") == 2
    assert (checkpoints / "damaged" / "8").is_dir()
    resumed.train()
    for a, b in zip(*map(jax.tree.leaves, (resumed.agent.params, finished.agent.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_not_loaded(copied_run):
    step = setup.run_files(copied_run).checkpoints / "8"
    shutil.rmtree(step / "params")
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/8 is damaged"):
        loading.load_checkpoint(step)


def test_one_process_a_folder(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*another --name"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


def test_vanished_data_saves_the_run_and_says_what_is_missing(tiny_config):
    """Files that were open stay readable until they are closed, so it is the reader that fails here."""
    trainer = setup.make_trainer(tiny_config)
    batch = trainer.loader.batch

    def vanish(draw, **options):
        if draw == 3:
            raise FileNotFoundError(2, "No such file or directory", "data/episode_0.hdf5")
        return batch(draw, **options)

    trainer.loader.batch = vanish
    with pytest.raises(DataFault, match=r"no batch can be made for update 3: .*episode_0.*--resume"):
        trainer.train()
    assert trainer.parts.checkpoints.steps() == [3]
    shutil.rmtree(tiny_config.data.path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        setup.make_trainer(tiny_config, resume=True)


def poison(trainer, is_poisoned):
    """NaN among the rewards of some batches."""
    batch = trainer.loader.batch

    def made(draw, **options):
        found = batch(draw, **options)
        return dataclasses.replace(found, rewards=found.rewards * np.nan) if is_poisoned(draw) else found

    trainer.loader.batch = made
    return batch


def test_many_skipped_updates_roll_the_run_back(tiny_config, caplog):
    config = dataclasses.replace(tiny_config, offline_steps=12, max_skipped_updates=2)
    trainer = setup.make_trainer(config)
    batch = poison(trainer, lambda draw: 5 <= draw < 100)
    trainer.train()
    assert (int(trainer.agent.step), trainer.progress.rollbacks) == (12, 1)
    assert "Rolled back to step 4" in caplog.text
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.agent.params))
    lines = read_jsonl(setup.run_files(config).skipped)
    assert [(line["step"], line["in_a_row"]) for line in lines] == [(5, 1), (6, 2), (7, 3)]
    assert lines[0]["episode_id"] == batch(5).episode_id.tolist()
    losses = [line["train/total_loss"] for line in read_jsonl(setup.run_files(config).metrics)]
    assert sum(np.isnan(losses)) == 1  # of updates 7 and 8, neither was applied


def test_a_run_that_no_rollback_helps_ends(tiny_config):
    trainer = setup.make_trainer(dataclasses.replace(tiny_config, max_skipped_updates=2, max_rollbacks=1))
    poison(trainer, lambda draw: True)
    with pytest.raises(Diverged, match=r"2 updates in a row from step 0 .*1 rollbacks did not help"):
        trainer.train()


@pytest.mark.parametrize("donated", [False, True])
def test_out_of_memory_goes_on_in_smaller_pieces(tiny_config, caplog, monkeypatch, donated):
    """As a device would say it, until the batch of 8 is in four pieces. ``donated``: the failed call took the agent."""
    update = ACRLPDAgent.update

    def limited(agent, batch, rng, weights):
        if agent.config.gradient_accumulation_steps < 4 and int(agent.step) == 5:
            if donated:
                jax.tree.map(lambda leaf: leaf.delete(), agent)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return update(agent, batch, rng, weights)

    monkeypatch.setattr(ACRLPDAgent, "update", limited)
    agent = dataclasses.replace(tiny_config.agent, best_of_n_block=2)
    trainer = setup.make_trainer(dataclasses.replace(tiny_config, agent=agent))
    trainer.train()
    assert int(trainer.agent.step) == 8
    warnings = [text for text in caplog.messages if "out of memory in update 5" in text]
    assert ["best_of_n_strategy" in text for text in warnings] == [True, False, False]
    assert "agent.gradient_accumulation_steps from 2 to 4" in warnings[2]


def test_out_of_memory_with_nothing_left_to_shrink_ends(tiny_config, monkeypatch):
    def refuse(agent, batch, rng, weights):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(ACRLPDAgent, "update", refuse)
    with pytest.raises(RunFault, match="nothing can be made smaller"):
        setup.make_trainer(tiny_config).train()


class Unreachable:
    def write(self, record):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    def close(self):
        pass


def test_an_error_of_a_loggers_network_leaves_as_it_is_and_costs_no_update(tiny_config, monkeypatch, caplog):
    monkeypatch.setattr(run_log, "make_writers", lambda *what, **how: Unreachable())
    trainer = setup.make_trainer(tiny_config)
    with pytest.raises(ConnectionResetError):
        trainer.train()
    assert trainer.parts.checkpoints.steps() == [2]
    assert "update 2 is saved, use --resume" in caplog.text
    assert int(setup.make_trainer(tiny_config, resume=True).agent.step) == 2


@pytest.mark.parametrize("kind", ["used up", "not finite", "no room"])
def test_an_unforeseen_error_is_told_first_whatever_else_goes_wrong(tiny_config, monkeypatch, caplog, kind):
    trainer = setup.make_trainer(tiny_config)
    batch = trainer.loader.batch

    def fail(draw, **options):
        if draw < 3:
            return batch(draw, **options)
        if kind == "used up":
            jax.tree.map(lambda leaf: leaf.delete(), trainer.agent)
        elif kind == "not finite":
            params = jax.tree.map(lambda leaf: leaf * np.nan, trainer.agent.params)
            trainer.state.agent = dataclasses.replace(trainer.agent, params=params)
        else:
            monkeypatch.setattr(trainer.parts.checkpoints, "save", lambda *what, **how: 1 / 0)
        raise RuntimeError("the simulator is on fire")

    trainer.loader.batch = fail
    with pytest.raises(RuntimeError, match="on fire"):
        trainer.train()
    assert trainer.parts.checkpoints.steps() == []
    assert ("could not be saved" in caplog.text) == (kind == "no room")


@pytest.mark.parametrize(
    ("error", "is_of_storage"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error", "run/metrics.jsonl"), True),
        (PermissionError(errno.EACCES, "Permission denied", "run/metrics.jsonl"), True),
        (PermissionError(errno.EACCES, "Permission denied", "elsewhere/file"), False),
        (OSError(errno.ENOSPC, "No space left on device", "elsewhere/file"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_what_is_an_error_of_the_runs_folder(error, is_of_storage):
    with pytest.raises(RunFault if is_of_storage else type(error)), explain_storage(Path("run")):
        raise error
