"""``--overwrite`` loses nothing: the old run is deleted last, and nothing that is not a run."""

import contextlib
import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data.formats.options import DataSource
from acrlpd.envs.env import EnvConfig
from acrlpd.training import loading, overwriting, setup
from acrlpd.training.faults import RunFault
from acrlpd.training.guards import LOCK_FILE, RunLock


def tree(folder):
    """Every file's content, but for the lock, in which each process that comes by writes its name."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


@pytest.fixture
def runs(copied_run):
    """The folder of a finished run alone."""
    return Path(copied_run.run_dir)


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_a_trained_run_holds_nothing_but_what_a_run_makes(finished):
    names = {path.name for path in setup.run_files(finished.config).directory.iterdir()}
    assert names <= overwriting.OURS


def test_the_old_run_is_there_until_the_new_one_has_a_checkpoint(copied_run, runs, monkeypatch):
    before = tree(runs / "tiny")
    trainer = setup.make_trainer(copied_run, overwrite=True)
    seen, save = [], trainer.parts.checkpoints.save

    def saving(*what, **how):
        seen.append(tree(runs / "tiny.overwritten"))
        return save(*what, **how)

    monkeypatch.setattr(trainer.parts.checkpoints, "save", saving)
    trainer.train()
    assert seen[0] == before
    assert seen[1:] == [{}] * (len(seen) - 1)
    assert {path.name for path in runs.iterdir()} == {"tiny"}


@pytest.mark.parametrize("mistake", ["no data", "no weights", "other robot", "interrupt"])
def test_a_run_that_does_not_start_gives_the_old_one_back(copied_run, runs, mistake, monkeypatch, caplog):
    wrong = {
        "no data": with_data(copied_run, path="nowhere"),
        "other robot": with_data(copied_run, action_dim=9),
        "no weights": dataclasses.replace(copied_run, policy=dataclasses.replace(copied_run.policy, weights="no.npz")),
        "interrupt": copied_run,
    }[mistake]
    if mistake == "interrupt":
        monkeypatch.setattr(setup, "make_norm_stats", lambda *what: (_ for _ in ()).throw(KeyboardInterrupt()))
    before = tree(runs)
    with pytest.raises((ValueError, OSError, KeyboardInterrupt)):
        setup.make_trainer(wrong, overwrite=True)
    assert tree(runs) == before
    assert "the new run did not start; the old one is in" in caplog.text
    RunLock(runs / "tiny").release()


def test_a_run_that_ends_before_its_first_checkpoint_leaves_the_old_one_and_the_next_command_names_it(
    copied_run, runs, monkeypatch, caplog
):
    before = tree(runs / "tiny")
    trainer = setup.make_trainer(copied_run, overwrite=True)
    monkeypatch.setattr(trainer, "_update", lambda phase: (_ for _ in ()).throw(RunFault("out of luck")))
    with pytest.raises(RunFault, match="out of luck"):
        trainer.train()
    assert tree(runs / "tiny.overwritten") == before
    assert f"the old one is kept: {runs / 'tiny.overwritten'}" in caplog.text
    for command in (
        lambda: setup.make_trainer(copied_run, resume=True),
        lambda: loading.locate_checkpoint(runs / "tiny"),
        lambda: loading.locate_checkpoint(runs / "tiny" / "checkpoints"),
    ):
        caplog.clear()
        command()
        assert f"{runs / 'tiny.overwritten'} holds the run that --overwrite set aside" in caplog.text
    back = dataclasses.replace(copied_run, name="tiny.overwritten")
    assert int(setup.make_trainer(back, resume=True).agent.step) == 8


def test_a_run_that_is_in_use_is_not_overwritten(copied_run, runs):
    lock, before = RunLock(runs / "tiny"), tree(runs)
    with pytest.raises(ValueError, match="is in use by process"):
        setup.make_trainer(copied_run, overwrite=True)
    assert tree(runs) == before
    lock.release()


def nothing_happens(config, match):
    runs = Path(config.run_dir)
    before = sorted(path.name for path in runs.rglob("*")), tree(runs)
    with pytest.raises(ValueError, match=match):
        setup.make_trainer(config, overwrite=True)
    assert (sorted(path.name for path in runs.rglob("*")), tree(runs)) == before


@pytest.mark.parametrize("name", ["thesis.tex", ".git", "model.safetensors", "src"])
def test_a_folder_that_holds_something_else_stays(copied_run, runs, name):
    (runs / "tiny" / name).mkdir() if name == "src" else (runs / "tiny" / name).write_text("mine")
    nothing_happens(copied_run, rf"holds {name}, which no run makes")


@pytest.mark.parametrize("config", [{"model_type": "gemma"}, ["a"], {"policy": "cfg", "name": "x"}, 7])
def test_a_config_of_another_program_stays(tiny_config, config):
    folder = Path(tiny_config.run_dir) / "other"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    nothing_happens(dataclasses.replace(tiny_config, name="other"), "is not the configuration of a run")


def test_a_link_or_a_file_stays(copied_run, runs):
    (runs / "link").symlink_to(runs / "tiny")
    (runs / "file").write_text("mine")
    nothing_happens(dataclasses.replace(copied_run, name="link"), "is a link to .*tiny")
    nothing_happens(dataclasses.replace(copied_run, name="file"), "is no folder")


@pytest.mark.parametrize("damage", ["", "{", "[" * 100_000, None])
def test_a_run_without_a_readable_config_can_be_overwritten(copied_run, damage):
    file = setup.run_files(copied_run).config
    file.unlink() if damage is None else file.write_text(damage)
    assert int(setup.make_trainer(copied_run, overwrite=True).agent.step) == 0


OF_PATHS = {field.split(".")[1] for field in overwriting.READ}
NO_PATHS = {
    *("default_task", "filter_key", "cameras", "state_keys", "action_keys"),
    *("paligemma_variant", "action_expert_variant", "vision_variant"),
}


def test_every_text_of_a_configuration_is_known_to_name_a_file_or_not():
    """A new field that names something to read belongs to ``overwriting.READ``."""
    texts = {
        name
        for part in (DataConfig, PolicyConfig)
        for name, kind in typing.get_type_hints(part).items()
        if is_of_text(kind)
    }
    assert texts == OF_PATHS | NO_PATHS


def is_of_text(kind):
    return kind is str or any(map(is_of_text, typing.get_args(kind)))


@pytest.mark.parametrize("field", overwriting.READ)
@pytest.mark.parametrize("way", ["absolute", "relative", "link", "the run itself"])
def test_what_the_new_run_reads_is_neither_moved_nor_deleted(copied_run, runs, field, way, monkeypatch):
    monkeypatch.chdir(runs.parent)
    (runs / "tiny" / "prior").mkdir()
    (runs / "shortcut").symlink_to(runs / "tiny" / "prior")
    path = {
        "absolute": runs / "tiny" / "prior",
        "relative": f"{runs.name}/./tiny/checkpoints/../prior",
        "link": runs / "shortcut",
        "the run itself": runs / "tiny",
    }[way]
    part, name = field.split(".")
    changed = dataclasses.replace(getattr(copied_run, part), **{name: str(path)})
    nothing_happens(dataclasses.replace(copied_run, **{part: changed}), rf"{field} \(.*\) lies in .*tiny, which")


def test_an_environment_in_the_old_runs_folder_is_read_too(copied_run, runs):
    env = EnvConfig(f"custom/{runs}/tiny/prior/world.py:make")
    nothing_happens(dataclasses.replace(copied_run, env=env), r"env\.name \(.*world\.py\) lies in .*tiny, which")


def test_data_sets_with_options_of_their_own_and_an_extraction_are_read_too(copied_run, runs):
    inside = runs / "tiny" / "prior"
    for each in (DataSource(path=str(inside)), DataSource(path="elsewhere", frame_cache=str(inside))):
        data = dataclasses.replace(copied_run.data, path=None, frame_cache=None, sources=(each,))
        nothing_happens(dataclasses.replace(copied_run, data=data), r"data\.sources \(.*prior\) lies in .*tiny, which")
    agent = dataclasses.replace(copied_run.agent, extraction=f"{inside}/mine.py:Mine")
    nothing_happens(dataclasses.replace(copied_run, agent=agent), r"agent\.extraction \(.*mine\.py\) lies in .*tiny")


@given(st.text(max_size=8))
def test_a_name_is_that_of_one_folder_below_run_dir(name):
    config = TrainConfig(name=name, data=DataConfig(path="data"), run_dir="runs")
    with contextlib.suppress(ValueError):
        directory = setup.run_files(config).directory
        assert directory.resolve().parent == Path("runs").resolve()
        assert name.isprintable()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc", "../x", "a\\b", "a\nb", "\x1b[2J", "a\0b", "\u202egpj", "\ud800"]
)
def test_names_that_lead_elsewhere_are_refused(tiny_config, name):
    before = tree(tiny_config.run_dir)
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="expected the name of one folder below run_dir"):
            setup.make_trainer(dataclasses.replace(tiny_config, name=name), **how)
    assert tree(tiny_config.run_dir) == before
