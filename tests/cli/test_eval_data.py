"""``acrlpd eval --data``: a checkpoint of ours or openpi's beside recorded episodes, without a simulator."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from tests.training.conftest import make_config, make_episode

from acrlpd.cli.main import main
from acrlpd.data import statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.view import normalize
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.models import weights
from acrlpd.models.pi0 import Pi0Config
from acrlpd.training import setup
from acrlpd.types import Episode


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without a simulator that held out one episode of its four."""
    config = make_config(tmp_path_factory.mktemp("run"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.25))
    trainer = setup.make_trainer(config)
    trainer.train()
    return config, str(setup.run_files(config).directory)


def test_a_run_is_compared_with_what_it_held_out(run, capsys):
    config, folder = run
    assert main(["eval", "--checkpoint", folder, "--data", config.data.path]) == 0
    told = capsys.readouterr().out
    assert "chunks of 1 episodes, 3 steps of each executed" in told
    assert "the last action once more" in told
    assert "trained on" not in told
    kept = json.loads((setup.run_files(config).offline_evaluation).read_text())
    assert kept["errors"].keys() == {"sample", "best", "repeat", "mean"}
    assert kept["step"] == 8
    assert main(["eval", "--checkpoint", folder, "--data", config.data.path, "--validation_fraction", "0.5"]) == 0
    assert "held out 0.25 of" in capsys.readouterr().out


def test_other_data_is_used_whole_and_growing_data_is_told(run, tmp_path, capsys):
    config, folder = run
    rng = np.random.default_rng(1)
    for number in range(3):
        episode = make_episode(rng, 6, success=number > 0)
        hdf5.write_episode(hdf5.episode_path(tmp_path, number), episode)
    flags = ["--data", str(tmp_path), "--json", "--execute_horizon", "1", "--output", str(tmp_path / "found.json")]
    assert main(["eval", "--checkpoint", folder, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["episodes"], found["executed"], found["remarks"]) == (3, 1, [])
    assert (found["telling"]["successes"], found["telling"]["failures"]) == (2, 1)
    assert json.loads((tmp_path / "found.json").read_text())["score"] == found["score"]
    extra = hdf5.episode_path(tmp_path / config.data.path, 99)
    hdf5.write_episode(extra, make_episode(rng, 6, success=True))
    try:
        assert main(["eval", "--checkpoint", folder, "--data", config.data.path]) == 0
    finally:
        extra.unlink()
    assert "the data has changed since the run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], r"has no simulator to act in. Name recorded episodes instead, --data /"),
        (["--data", "{data}", "--full"], "--full would have no effect: it is used in a simulator"),
        (["--chunks", "5"], "--chunks would have no effect: it is used only with --data"),
        (["--data", "{data}", "--robot", "droid"], "--robot say what a checkpoint of openpi's does not hold"),
        (["--data", "{other}"], "state and actions have 3 and 1 dimensions, those of the checkpoint 4 and 2"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(run, tmp_path, capsys, flags, expected):
    config, folder = run
    episode = Episode(np.zeros((4, 3), np.float32), np.zeros((4, 1), np.float32), np.zeros(4), np.zeros(4, bool), "go")
    hdf5.write_episode(hdf5.episode_path(tmp_path, 0), episode)
    words = [flag.format(data=config.data.path, other=tmp_path) for flag in flags]
    assert main(["eval", "--checkpoint", folder, *words]) == 2
    assert expected.replace("\\", "") in capsys.readouterr().err


def libero(rng, length, *, success):
    """An episode of LIBERO's robot, as openpi's checkpoints see it."""
    pictures = {name: rng.integers(0, 256, (length, 16, 16, 3), np.uint8) for name in ("image", "wrist_image")}
    return Episode(
        state=rng.normal(size=(length, 8)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(length, 7)).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        task="lift it",
        images=pictures,
        success=success,
    )


def released(folder):
    """A nano pi0 as openpi's releases have it: parameters and statistics side by side."""
    sizes = {"paligemma_variant": "nano", "action_expert_variant": "nano_expert", "vision_variant": "nano"}
    model = Pi0Config(action_dim=8, action_horizon=4, vocab_size=PromptTokenizer().vocab_size, **sizes)
    arrays = weights.flatten(nnx.eval_shape(lambda: model.create(nnx.Rngs(0))))
    weights.write_params(folder / "params", {path: np.zeros(leaf.shape, np.float32) for path, leaf in arrays.items()})
    stats = statistics.bounds_stats(-np.ones(8), np.ones(8))
    normalize.save(folder / "assets" / "lab" / normalize.FILE_NAME, {"state": stats, "actions": stats})
    return folder


@pytest.mark.slow
def test_a_checkpoint_of_openpis_gets_everything_but_q(tmp_path, capsys):
    """Its velocity is zero here, so its sample is the noise itself and its flow loss is that of guessing nothing."""
    rng = np.random.default_rng(0)
    for number in range(2):
        hdf5.write_episode(hdf5.episode_path(tmp_path / "data", number), libero(rng, 9, success=bool(number)))
    flags = ["--checkpoint", str(released(tmp_path / "openpi")), "--data", str(tmp_path / "data")]
    assert main(["eval", *flags, "--robot", "libero", "--action_horizon", "4", "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "16 chunks of 2 episodes, 4 steps of each executed" in told
    assert "Q: this policy has no critics" in told
    assert "flow loss" in told
    assert main(["eval", *flags]) == 2
    assert "--robot aloha | droid | libero" in capsys.readouterr().err
