"""Every file of a run's folder, damaged in every way: nothing is lost silently, nothing ends in a traceback.

A run is trained once, with two checkpoints behind its newest and some episodes of its own. Of a copy one file is
damaged; then it is resumed, evaluated and served as the commands do it, in this process. Each must end with exactly
what one of its checkpoints holds, and say so if that is not the newest, or with an error that names what is wrong.
"""

import dataclasses
import itertools
import json
import logging
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.training import fault_job

from acrlpd import deploy
from acrlpd.cli import train
from acrlpd.data import hdf5
from acrlpd.data.replay import ReplayJournal
from acrlpd.envs import collect, vector
from acrlpd.envs.env import SimulatedEnvironment
from acrlpd.training import checkpoint, setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, DamagedCheckpoint, LaterVersion
from acrlpd.training.run import RunFiles

OLD_RUN = Path(__file__).with_name("run_of_format_0.tar.xz")
NEWEST, BEFORE = 28, 20
EPISODES = 2  # in the journal at the newest checkpoint
TOLD = (ValueError, ImportError, OSError)  # what the command line turns into one message


def make_config(run_dir, seed):
    config = fault_job.make_config(run_dir)
    return dataclasses.replace(
        config,
        name="run",
        seed=seed,
        offline_steps=4,
        online_steps=24,
        save_frequency=BEFORE,
        policy=dataclasses.replace(config.policy, hidden_dims=(4,)),
        agent=dataclasses.replace(
            config.agent, critic=dataclasses.replace(config.agent.critic, hidden_dims=(4,)), policy_ema_decay=0.5
        ),
        data=dataclasses.replace(config.data, collect=dataclasses.replace(config.data.collect, episodes=2)),
        eval=dataclasses.replace(config.eval, frequency=40, progress_episodes=2),
    )


@pytest.fixture(scope="module", autouse=True)
def point():
    """The toy world instead of simulators."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vector, collect):
            patch.setattr(module, "make", lambda config: SimulatedEnvironment(fault_job.Point(), config))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's folder, and that of another seed."""
    found = []
    for seed in range(2):
        config = make_config(tmp_path_factory.mktemp(f"seed-{seed}"), seed)
        setup.make_trainer(config).train()
        found.append(setup.run_files(config).directory)
    return found


@pytest.fixture(scope="module")
def expected(runs):
    """By step: what its checkpoint holds. Meanwhile each template is made once: every command makes the same."""
    made, make_agent = {}, setup.make_agent

    def once(config, dims, cameras):
        key = repr((config.agent, config.policy, config.optimizers, config.fsdp_devices, dims, cameras))
        agent = made.get(key) or make_agent(config, dims, cameras)
        if not isinstance(agent.step, jax.core.Tracer):
            made[key] = agent
        return agent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_agent", once)
        steps = (4, BEFORE, NEWEST)
        yield {step: setup.load_checkpoint(runs[0] / "checkpoints" / str(step)).agent for step in steps}


def assert_same(one, other, *, acts=False):
    names = ("params", "frozen", "target_critic", "ema", "health", "step") + (() if acts else ("opt_state",))
    parts = [[getattr(agent, name) for name in names] for agent in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# -- ways to damage ----------------------------------------------------------------------------------------------------


def delete(path, other):
    path.unlink()


def empty(path, other):
    path.write_bytes(b"")


def cut(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn_bits(path, other):
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        content[place] ^= 1
    path.write_bytes(content)


def exchange(path, other):
    """With the file of the same name in another run; names of array files are random, so one in the same place."""
    same = other if other.is_file() else sorted(other.parent.iterdir())[-1]
    path.write_bytes(same.read_bytes())


KINDS = (delete, empty, cut, turn_bits, exchange)


def files_of(run):
    """All but those of older checkpoints, by names that are the same in every run."""
    older = [run / "checkpoints" / str(step) for step in (4, BEFORE)]
    found = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return [path.relative_to(run) for path in found if not any(path.is_relative_to(step) for step in older)]


# -- what the commands do ----------------------------------------------------------------------------------------------


def resume(run, expected):
    config = train.stored_config(run)
    trainer = setup.make_trainer(config, resume=True)
    trainer._lock.release()
    assert config == dataclasses.replace(make_config(run.parent, 0), run_dir=str(run.parent), name=run.name)
    assert_same(trainer.agent, expected[int(trainer.agent.step)])
    numbers = [entry["episode"] for entry in trainer._interaction.journal.metadata()]
    assert len(numbers) == len(set(numbers)) == trainer._interaction.replay.num_episodes == EPISODES
    assert trainer.progress.env_steps == 20
    return int(trainer.agent.step)


def evaluate(run, expected):
    loaded = setup.load_checkpoint(run)
    assert_same(loaded.agent, expected[loaded.step])
    return loaded.step


def serve(run, expected):
    assert deploy.is_ours(run)
    trained = deploy.load_trained(run)
    assert_same(trained.agent, expected[trained.step], acts=True)
    return trained.step


COMMANDS = (resume, evaluate, serve)


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def check(run, file, damage, command, expected, caplog):
    """One command on a damaged run; returns what came out, for a table."""
    caplog.clear()
    before = contents(run)
    try:
        step = command(run, expected)
    except TOLD as error:
        message = str(error)
        place = next((part for part in ("checkpoints", "prior", "replay") if part in file.parts), file.name)
        assert place in message, f"{file}, {damage.__name__}, {command.__name__}: {message}"
        outcome = "told"
    else:
        assert step in (BEFORE, NEWEST)
        if step != NEWEST:
            assert f"{NEWEST} is damaged" in caplog.text
            assert "Falling back to the checkpoint before it" in caplog.text
        outcome = f"step {step}"
    if command is not resume:
        assert contents(run) == before, "a reader must not change anything"
    return outcome


def damaged_run(runs, target, file, damage):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(runs[0], target)
    damage(target / file, runs[1] / file)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_whole_is_taken(runs, expected, tmp_path, command, caplog):
    shutil.copytree(runs[0], tmp_path / "run")
    assert command(tmp_path / "run", expected) == NEWEST
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


QUICK = (
    ("run/metadata", cut, "step 20"),
    ("_METADATA", delete, "step 20"),
    ("d/*", turn_bits, "step 20"),
    ("d/*", exchange, "step 20"),
    ("config.json", exchange, "told"),
    ("config.json", delete, "step 28"),
    ("replay/episode_000001.hdf5", cut, "told"),
    ("replay/journal.jsonl", turn_bits, "step 28"),
    ("prior/episode_000000.hdf5", exchange, "told"),
)


@pytest.mark.parametrize(("pattern", "damage", "outcome"), QUICK, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_all_damages(runs, expected, tmp_path, pattern, damage, outcome, caplog):
    file = next(file for file in files_of(runs[0]) if file.match(pattern))
    damaged_run(runs, tmp_path / "run", file, damage)
    readers = {check(tmp_path / "run", file, damage, command, expected, caplog) for command in (evaluate, serve)}
    assert readers == {"step 20" if "checkpoints" in file.parts else "step 28"}
    assert check(tmp_path / "run", file, damage, resume, expected, caplog) == outcome


@pytest.mark.slow
@pytest.mark.parametrize("damage", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_file_of_a_run(runs, expected, tmp_path, damage, caplog):
    for file in files_of(runs[0]):
        damaged_run(runs, tmp_path / "run", file, damage)
        for command in (evaluate, serve, resume):  # the last one moves what is damaged away
            check(tmp_path / "run", file, damage, command, expected, caplog)
