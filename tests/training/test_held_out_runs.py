"""A run without a simulator that holds episodes out: what it is judged by, what it keeps, what its page shows."""

import dataclasses
import json

import numpy as np
import pytest
from tests.training.conftest import make_config, make_episode

from acrlpd.data.formats import hdf5
from acrlpd.training import loading, setup
from acrlpd.training.metrics import read_metrics
from acrlpd.training.report import read_run, write_report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    config, rng = make_config(folder), np.random.default_rng(0)
    for number in range(6):
        episode = make_episode(rng, 9 + number, success=number % 2 == 0)
        frames = rng.integers(0, 256, (len(episode), 8, 8, 3), np.uint8)
        hdf5.write_episode(
            hdf5.episode_path(folder / "films", number), dataclasses.replace(episode, images={"top": frames})
        )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(folder / "films"), validation_fraction=0.34),
        eval=dataclasses.replace(config.eval, frequency=2, held_out_chunks=12),
    )
    trainer = setup.make_trainer(config)
    return trainer, trainer.train()


def test_the_best_policy_is_that_of_the_smallest_error(trained):
    trainer, summary = trained
    files = trainer.parts.files
    config = dataclasses.replace(trainer.config.eval, held_out_chunks=12)
    assert trainer.config.eval == config
    records = [each for each in read_metrics(files.metrics) if "eval/action_error" in each]
    assert [each["step"] for each in records] == [2, 4, 6, 8]
    assert all(each["eval/held_out_episodes"] == 2 and 10 <= each["eval/held_out_chunks"] <= 14 for each in records)
    errors = {each["step"]: each["eval/action_error"] for each in records}
    best = min(errors, key=errors.get)
    assert summary["best"] == json.loads(files.best.read_text()) == {"step": best, "action_error": errors[best]}
    assert loading.kept_step(files.directory) == best
    kept = json.loads(files.offline_evaluation.read_text())
    assert (kept["step"], kept["score"]) == (best, errors[best])
    assert trainer.loader.contents()["episodes"] == 4


def test_its_page_shows_errors_and_pictures(trained):
    trainer, _ = trained
    page = write_report(trainer.parts.files.directory).read_text()
    for words in ("Held-out episodes", "Predicted and recorded actions", "Action error by step", "Camera top along"):
        assert words in page
    assert "No evaluation" not in page
    assert "needs the evaluations" not in page
    assert page.count("data:image/jpeg") == 8
    assert len(read_run(trainer.parts.files.directory).held_out) == 4


def test_a_resumed_run_knows_its_best(trained):
    trainer, _ = trained
    config = dataclasses.replace(trainer.config, offline_steps=10)
    resumed = setup.make_trainer(config, resume=True, override=("offline_steps",))
    before = trainer.progress
    assert resumed.progress.best_score == before.best_score
    summary = resumed.train()
    assert summary["best"]["action_error"] <= before.best_step_error
