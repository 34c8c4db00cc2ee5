"""``acrlpd diagnose``: a run beside its own data, beside data that was broken on purpose, and in its simulator."""

import dataclasses
import json

import numpy as np
import pytest
from tests.envs.test_custom import CAR
from tests.training.conftest import make_config

from acrlpd.cli.main import main
from acrlpd.data.formats import hdf5
from acrlpd.data.sources import open_episodes
from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.training import setup
from acrlpd.types import Episode


def arm(number, length=40):
    """An arm whose actions are the next positions of two joints, and a gripper."""
    rng = np.random.default_rng(number)
    path = np.cumsum(rng.normal(size=(length + 1, 2)) * 0.1, axis=0) + rng.normal(size=2)
    gripper = np.where(np.arange(length + 1) > length // 4, 1.0, -1.0)[:, None]
    both = np.concatenate([path, gripper], axis=1).astype(np.float32)
    return Episode(
        state=both[:-1],
        actions=both[1:],
        rewards=np.full(length, -1, np.float32),
        terminals=np.zeros(length, bool),
        task="reach",
        success=number % 2 == 0,
    )


def write(folder, change=lambda episode: episode, *, fps=None):
    for number in range(6):
        hdf5.write_episode(hdf5.episode_path(folder, number), change(arm(number)), {} if fps is None else {"fps": fps})
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = make_config(folder)
    data = dataclasses.replace(config.data, path=write(folder / "arm", fps=10.0), validation_fraction=0.2)
    config = dataclasses.replace(config, data=data, offline_steps=2)
    setup.make_trainer(config).train()
    return data.path, str(setup.run_files(config).directory)


def verdicts(capsys, *words):
    code = main(["diagnose", *words, "--json"])
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert code == int(any(each["verdict"] == "wrong" for each in found.values()))
    return {name: each["verdict"] for name, each in found.items()}


ABOUT_DATA = ("state statistics", "actions statistics", "action convention", "grippers", "rate and horizon", "cameras")


def test_a_run_beside_its_own_data(run, tmp_path, capsys):
    data, folder = run
    found = verdicts(capsys, folder, "--data", data)
    assert {name: found[name] for name in ABOUT_DATA} == dict.fromkeys(ABOUT_DATA, "good")
    assert found["actions"] == "wrong"  # after two updates it has learned nothing
    assert main(["diagnose", folder, "--data", data, "--html", str(tmp_path / "page.html")]) == 1
    told = capsys.readouterr().out
    assert "WRONG actions" in told
    assert "dimensions 0-2 follow the state (absolute)" in told
    assert "action convention" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda e: dataclasses.replace(e, actions=e.actions - e.state * [1, 1, 0]), "action convention"),
        (lambda e: dataclasses.replace(e, actions=e.actions * [1, 1, -1]), "grippers"),
        (lambda e: dataclasses.replace(e, state=np.degrees(e.state)), "state statistics"),
        (lambda e: dataclasses.replace(e, actions=np.degrees(e.actions)), "actions statistics"),
    ],
)
def test_broken_data_is_found(run, tmp_path, capsys, change, wrong):
    assert verdicts(capsys, run[1], "--data", write(tmp_path / "broken", change, fps=10.0))[wrong] == "wrong"


def test_another_rate_is_found(run, tmp_path, capsys):
    assert verdicts(capsys, run[1], "--data", write(tmp_path / "slow", fps=5.0))["rate and horizon"] == "wrong"


def test_actions_are_replayed_from_the_recorded_starts(tmp_path, capsys):
    """Those that were collected here begin where their seeds say; with another seed, replay says little."""
    data = tmp_path / "car"
    made = []
    collect(EnvConfig(CAR, max_episode_steps=20), range(3), policy="random", seed=5, on_episode=made.append)
    for each in made:
        hdf5.write_episode(hdf5.episode_path(data, each.number), each.episode)
    config = make_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)), offline_steps=1)
    setup.make_trainer(config).train()
    folder = str(setup.run_files(config).directory)
    assert open_episodes(data).num_episodes == 3
    words = [folder, "--data", str(data), "--env.name", CAR, "--replay_seed"]
    main(["diagnose", *words, "5"])
    told = capsys.readouterr().out
    assert "of 0 episodes that had not failed" in told
    assert "the first states lie 0 deviations from the recorded ones" in told
    main(["diagnose", *words, "6"])
    assert "name their seed (--replay_seed)" in capsys.readouterr().out
    assert main(["diagnose", *words[:3], "--replay_seed", "1"]) == 2
    assert "no effect without --env.name" in capsys.readouterr().err
