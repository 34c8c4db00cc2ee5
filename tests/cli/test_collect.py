"""``acrlpd collect`` as a person uses it: once, again, and with a policy that was trained."""

import dataclasses

import pytest
from tests.envs.test_custom import CAR
from tests.training.test_online import CONFIG

from acrlpd.cli.main import main
from acrlpd.data.formats import hdf5
from acrlpd.training import setup


def collect(*arguments):
    return main(["collect", *map(str, arguments)])


def test_a_folder_is_filled_and_not_mixed(tmp_path, capsys):
    car = ("--output", tmp_path, "--name", CAR, "--max_episode_steps", 5, "--policy", "random")
    assert collect(*car, "--episodes", 2) == 0
    first = hdf5.episode_path(tmp_path, 0).read_bytes()
    assert collect(*car, "--episodes", 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [hdf5.episode_path(tmp_path, n).name for n in range(3)]
    assert hdf5.episode_path(tmp_path, 0).read_bytes() == first
    episode = hdf5.read_episode(hdf5.episode_path(tmp_path, 2))
    assert (len(episode), episode.success, episode.task) == (5, False, "drive up the hill")
    assert collect(*car, "--episodes", 4, "--seed", 1) == 2
    assert "made with another seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "random", "--noise_range", 0, 1), "has no use for it"),
        (("--policy", "checkpoint"), "belong together"),
        (("--checkpoint", "runs/demo"), "belong together"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:  # the flag parser's own way out
        collect("--output", tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_checkpoint_collects_in_its_own_environment(tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), name="run", online_steps=0, eval=EVAL)
    setup.make_trainer(config).train()
    out = tmp_path / "data"
    arguments = ("--output", out, "--policy", "checkpoint", "--checkpoint", tmp_path / "run", "--num_envs", 2)
    assert collect(*arguments, "--episodes", 3) == 2  # a checkpoint runs no code that the command does not name
    arguments = (*arguments, "--name", CONFIG.env.name)
    assert collect(*arguments, "--episodes", 3, "--max_episode_steps", 9) == 0
    episodes = [hdf5.read_episode(hdf5.episode_path(out, number)) for number in range(3)]
    assert [len(episode) for episode in episodes] == [9, 9, 9]  # the flag, in the environment of the run
    assert {episode.task for episode in episodes} == {"drive up the hill"}
    made_by = hdf5.read_metadata(hdf5.episode_path(out, 0))["made_by"]
    assert (made_by["policy"], made_by["mode"]) == (f"{tmp_path / 'run'}, step 4", "explore")


EVAL = dataclasses.replace(CONFIG.eval, episodes=1, num_envs=1)
