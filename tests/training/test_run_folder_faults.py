"""Every file of a run's folder, damaged in every way: nothing is lost silently, nothing ends in a traceback.

A run is trained once, with two checkpoints behind its newest and some episodes of its own. Of a copy one file is
damaged; then it is resumed, evaluated and served as the commands do it, in this process. Each must end with exactly
what one of its checkpoints holds, and say so if that is not the newest, or with an error that names what is wrong.
"""

import dataclasses
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.training import fault_job

from acrlpd import deploy
from acrlpd.cli import train
from acrlpd.data.formats import hdf5
from acrlpd.data.replay import ReplayJournal
from acrlpd.envs import collect, registry
from acrlpd.envs.env import SimulatedEnvironment
from acrlpd.training import checkpoint, loading, setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, DamagedCheckpoint, LaterVersion
from acrlpd.training.run import RunFiles

OLD_RUN = Path(__file__).with_name("run_of_format_0.tar.xz")
NEWEST, BEFORE = 28, 20
EPISODES = 2  # in the journal at the newest checkpoint
THOROUGH = "ACRLPD_FAULTS" in os.environ
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
        agent=dataclasses.replace(config.agent, critic=dataclasses.replace(config.agent.critic, hidden_dims=(4,))),
        data=dataclasses.replace(config.data, collect=dataclasses.replace(config.data.collect, episodes=2)),
        eval=dataclasses.replace(config.eval, frequency=40, progress_episodes=2),
    )


@pytest.fixture(scope="module", autouse=True)
def point():
    """The toy world instead of simulators."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (registry, collect):
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

    def once(make):
        made = {}

        def found(config, dims, cameras):
            key = repr((config.agent, config.policy, config.optimizers, config.fsdp_devices, dims, cameras))
            if key not in made:
                made[key] = make(config, dims, cameras)
            return made[key]

        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_agent", once(setup.make_agent))
        patch.setattr(loading, "abstract_agent", once(loading.abstract_agent))
        steps = (4, BEFORE, NEWEST)
        yield {step: loading.load_checkpoint(runs[0] / "checkpoints" / str(step)).agent for step in steps}


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
    trainer.parts.lock.release()
    begun = dataclasses.replace(make_config(run.parent, 0), run_dir=str(run.parent), name=run.name)
    assert config == begun.with_critic_horizon(begun.critic_horizon)
    assert_same(trainer.agent, expected[int(trainer.agent.step)])
    numbers = [entry["episode"] for entry in trainer.parts.interaction.journal.metadata()]
    assert len(numbers) == len(set(numbers)) == trainer.parts.interaction.replay.num_episodes == EPISODES
    assert trainer.parts.interaction.replay.num_rows == 20 <= trainer.progress.env_steps
    return int(trainer.agent.step)


def evaluate(run, expected):
    loaded = loading.load_checkpoint(run)
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
    """Each damage of each file, with one of the commands in turn; with all of them by ``make test-faults``."""
    for number, file in enumerate(files_of(runs[0]), KINDS.index(damage)):
        damaged_run(runs, tmp_path / "run", file, damage)
        in_turn = (COMMANDS[number % len(COMMANDS)],)
        for command in (evaluate, serve, resume) if THOROUGH else in_turn:  # resume moves what is damaged away
            check(tmp_path / "run", file, damage, command, expected, caplog)


# -- two files of a checkpoint, or two checkpoints, in each other's place ----------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("28/params/manifest.ocdbt", "28/acrlpd/manifest.ocdbt"),
        ("28/params/_METADATA", "28/acrlpd/_METADATA"),
        ("28/run/metadata", "20/run/metadata"),
        ("28/params", "20/params"),
        ("28/acrlpd", "20/acrlpd"),
        ("28", "20"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_places_is_noticed(runs, expected, tmp_path, one, other, caplog):
    """Files or folders; of a checkpoint that is broken by it, and of one that stays whole, but of another step."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    first, second, spare = (run / "checkpoints" / name for name in (one, other, "spare"))
    first.rename(spare), second.rename(first), spare.rename(second)
    for command in (evaluate, serve):
        caplog.clear()
        assert command(run, expected) in (4, BEFORE)
        assert f"{NEWEST} is damaged" in caplog.text


# -- the JSON of a checkpoint ------------------------------------------------------------------------------------------


def leaves_of(value, path=()):
    """Every field of nested JSON, the outer ones too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for name, each in inner for found in leaves_of(each, (*path, name))]


def changed_at(content, path, change):
    content = json.loads(json.dumps(content))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    change(inner, path[-1])
    return content


def drop(inner, name):
    del inner[name]


def of_another_type(inner, name):
    inner[name] = [] if isinstance(inner[name], (str, int, float, type(None))) else "text"


def of_another_value(inner, name):
    value = inner[name]
    inner[name] = value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else not value


@pytest.mark.parametrize("change", [drop, of_another_type, of_another_value])
def test_every_field_of_a_checkpoints_json_is_covered(runs, tmp_path, change):
    shutil.copytree(runs[0] / "checkpoints", tmp_path / "checkpoints")
    manager = ACRLPDCheckpointManager(tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / str(NEWEST) / "run" / "metadata"
    content = json.loads(file.read_text())
    fields = leaves_of(content)
    assert len(fields) > 100
    for path in fields:
        file.write_text(json.dumps(changed_at(content, path, change)))
        with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/{NEWEST} is damaged: .*run/metadata"):
            manager.read_run(NEWEST)
    file.write_text(json.dumps(content, indent=1, sort_keys=True))  # how it is laid out does not matter
    assert manager.read_run(NEWEST) == content


@pytest.mark.filterwarnings("ignore")
def test_a_version_that_is_not_known_yet(runs, expected, tmp_path, caplog):
    """A number that changed by itself makes a damaged checkpoint; a whole one of a later version is left alone."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "checkpoints" / str(NEWEST) / "run" / "metadata"
    later = json.loads(file.read_text()) | {"format_version": 99}
    file.write_text(json.dumps(later))
    message = r"run/metadata: written by a later version of acrlpd \(format 99; this one reads up to 1\): upgrade"
    for command in (evaluate, serve):
        caplog.clear()
        assert command(run, expected) == BEFORE
        assert "later version of acrlpd (format 99" in caplog.text
    file.write_text(json.dumps(checkpoint._sealed(later)))
    before = contents(run)
    for command in COMMANDS:
        with pytest.raises(LaterVersion, match=message):
            command(run, expected)
    after = contents(run)
    assert {path for path in after if after[path] != before.get(path)} <= {run / "lock"}


# -- what is absent ----------------------------------------------------------------------------------------------------


def resumed(run, **how):
    trainer = setup.make_trainer(train.stored_config(run), resume=True, **how)
    trainer.parts.lock.release()
    return trainer


@pytest.mark.parametrize("lost", ["all", "the last", "the last and its line"])
@pytest.mark.filterwarnings("ignore")
def test_a_replay_that_is_shorter_than_the_checkpoint_knows(runs, expected, tmp_path, lost):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    replay = RunFiles(run).replay
    if lost == "all":
        shutil.rmtree(replay)
    else:
        hdf5.episode_path(replay, 1).unlink()
        if lost.endswith("line"):
            index = replay / "journal.jsonl"
            index.write_text(index.read_text().splitlines(keepends=True)[0])
    left = 0 if lost == "all" else 1
    for _ in range(2):  # nothing is settled by asking twice
        with pytest.raises(ValueError, match=rf"replay holds {left} of the 2 episodes .* --override to go on without"):
            resumed(run)
    trainer = resumed(run, override=("*",))
    assert (len(trainer.parts.interaction.journal), trainer.progress.journal_episodes) == (left, left)
    assert_same(trainer.agent, expected[NEWEST])


@pytest.mark.filterwarnings("ignore")
def test_strays_of_the_journal_are_taken_up_once(runs, expected, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    replay = RunFiles(run).replay
    (replay / "journal.jsonl").unlink()
    shutil.copy(hdf5.episode_path(replay, 0), hdf5.episode_path(replay, 7))
    assert resume(run, expected) == NEWEST
    assert ReplayJournal(replay).numbers() == [0, 1]


def rename(prior):
    hdf5.episode_path(prior, 1).rename(hdf5.episode_path(prior, 5))


def shorten(prior):
    hdf5.episode_path(prior, 1).unlink()


def lengthen(prior):
    hdf5.write_episode(hdf5.episode_path(prior, 2), hdf5.read_episode(hdf5.episode_path(prior, 1)))


def change_a_number(prior):
    path = hdf5.episode_path(prior, 1)
    episode = hdf5.read_episode(path)
    episode.actions[3, 1] += 1e-3
    hdf5.write_episode(path, episode, hdf5.read_metadata(path))


@pytest.mark.parametrize("change", [rename, shorten, lengthen, change_a_number])
@pytest.mark.filterwarnings("ignore")
def test_prior_data_that_changed(runs, expected, tmp_path, change, caplog):
    shutil.copytree(runs[0], tmp_path / "run")
    files = RunFiles(tmp_path / "run")
    config = dataclasses.replace(train.stored_config(files.directory), run_dir=str(tmp_path))
    data = dataclasses.replace(config.data, path=str(tmp_path / "data"))
    shutil.copytree(files.directory / "prior", tmp_path / "data")
    named = dataclasses.replace(config, data=data)  # as if it had been trained on a folder of its own
    setup.make_trainer(named, resume=True, override=("data.path",)).parts.lock.release()
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data: the prior data has changed since .*--override to go on with what is"):
        setup.make_trainer(named, resume=True, override=("data.path",))
    trainer = setup.make_trainer(named, resume=True, override=("*",))
    trainer.parts.lock.release()
    assert "the prior data has changed" in caplog.text
    assert_same(trainer.agent, expected[NEWEST])


@pytest.mark.filterwarnings("ignore")
def test_without_config_json_the_checkpoints_own_is_taken(runs, expected, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    config = dataclasses.replace(make_config(tmp_path, 0), run_dir=str(tmp_path))
    RunFiles(run).config.unlink()
    other = dataclasses.replace(config, agent=dataclasses.replace(config.agent, discount=0.5))
    with pytest.raises(ValueError, match=r"already exists\. Use --resume"):
        setup.make_trainer(other)
    with pytest.raises(ValueError, match=r"agent\.discount: was 0\.99, now 0\.5"):
        setup.make_trainer(other, resume=True)
    assert "config.json is gone. Going on with the configuration that checkpoint 28 holds" in caplog.text
    assert resume(run, expected) == NEWEST


def test_a_damaged_config_json_without_a_checkpoint_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON.*Bring it back, or start anew"):
        train.stored_config(tmp_path)


# -- runs of before there were versions --------------------------------------------------------------------------------


@pytest.fixture
def old_run(tmp_path):
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_before_goes_on(old_run):
    assert loading.load_checkpoint(old_run / "checkpoints").step == NEWEST
    assert loading.load_checkpoint(old_run / "best").step == loading.load_checkpoint(old_run).step == BEFORE
    assert deploy.load_trained(old_run / "checkpoints").step == NEWEST
    trainer = setup.make_trainer(dataclasses.replace(train.stored_config(old_run), online_steps=44), resume=True)
    assert (int(trainer.agent.step), len(trainer.parts.interaction.journal)) == (NEWEST, EPISODES)
    trainer.train()
    assert int(loading.load_checkpoint(old_run / "checkpoints").agent.step) > NEWEST
    assert ACRLPDCheckpointManager(old_run / "checkpoints").read_run()["format_version"] == 1
    lines = (old_run / "replay" / "journal.jsonl").read_text().splitlines()
    assert len(lines) > EPISODES


@pytest.mark.parametrize("damage", [cut, turn_bits, empty, delete])
@pytest.mark.parametrize("file", ["run/metadata", "params/_METADATA", "acrlpd/manifest.ocdbt"])
def test_a_damaged_checkpoint_of_before_falls_back(old_run, damage, file, caplog):
    damage(old_run / "checkpoints" / str(NEWEST) / file, None)
    assert loading.load_checkpoint(old_run / "checkpoints").step == BEFORE
    assert f"{NEWEST} is damaged" in caplog.text


def test_a_lost_journal_of_before_is_noticed(old_run):
    shutil.rmtree(old_run / "replay")
    with pytest.raises(ValueError, match="replay holds 0 of the 1 episodes"):
        setup.make_trainer(train.stored_config(old_run), resume=True)
