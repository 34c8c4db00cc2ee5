"""acrlpd data, as a person types it."""

import dataclasses
import json

import numpy as np
import pytest

from acrlpd.cli.main import main
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.tools import inspection
from acrlpd.types import Episode


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(2):
        episode = Episode(
            state=rng.normal(size=(5, 2)).astype(np.float32),
            actions=rng.normal(size=(5, 1)).astype(np.float32),
            rewards=np.zeros(5, np.float32),
            terminals=np.zeros(5, bool),
            task="open the drawer",
            images={"top": rng.integers(0, 256, (5, 8, 8, 3), np.uint8)},
            success=number == 0,
        )
        hdf5.write_episode(hdf5.episode_path(tmp_path / "set", number), episode)
    return tmp_path / "set"


def test_inspect(folder, capsys):
    assert main(["data", "inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("acrlpd, 2 episodes, 10 steps", "1 of 2 (50%)", "open the drawer", "top 8x8", "problems  none"):
        assert words in shown


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_problems_as_json_and_exit_code(folder, capsys, command):
    bad = hdf5.episode_path(folder, 1)
    bad.write_bytes(bad.read_bytes()[:500])
    assert main(["data", command, str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is False
    assert found["contents"]["episodes"] == 1
    assert [(problem["level"], problem["episode"]) for problem in found["problems"]] == [("error", str(bad))]
    assert "truncated" in found["problems"][0]["text"]


def test_nothing_usable(folder, capsys):
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert main(["data", "validate", str(folder)]) == 1
    assert "no usable episode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["data", "inspct", "x"], "did you mean 'inspect'"),
        (["data", "inspect", "{tmp}/absent"], "no such file or folder"),
        (["data", "convert", "{set}", "{tmp}/new"], "give fps"),
        (["data", "inspect", "{set}", "--cameras", "wrist"], "no such camera"),
        (["data", "convert", "{set}", "{tmp}/new", "--fps", "nan"], "fps must be a number above 0 or None, got nan"),
        (["data", "convert", "{set}", "{tmp}/new", "--to", "hdf5", "--fps", "inf"], "fps must be a number above 0"),
        (["data", "convert", "{set}", "{tmp}/new", "--to", "hdf5", "--pictures", "png"], "--pictures means nothing"),
        (["data", "convert", "{set}", "{tmp}/new", "--to", "hdf5", "--robot-type", "arm"], "--robot-type means"),
        (["data", "convert", "{set}", "{tmp}/new", "--compression", "gzip"], "--compression means nothing"),
        (
            ["data", "cache", "{set}", "{tmp}/new", "--height", "0"],
            "height must be a whole number of at least 1, got 0",
        ),
        (
            ["data", "cache", "{set}", "{tmp}/new", "--width", "-5"],
            "width must be a whole number of at least 1, got -5",
        ),
    ],
)
def test_mistakes(folder, capsys, tmp_path, arguments, hint):
    code = main([argument.format(tmp=tmp_path, set=folder) for argument in arguments])
    captured = capsys.readouterr()
    assert code != 0
    assert hint in captured.err + captured.out


def write_play(path):
    """OGBench's form: two trajectories of three steps."""
    numbers = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    np.savez(path, observations=numbers, actions=numbers, terminals=np.arange(8) % 4 == 3)
    return str(path)


def test_a_rate_that_the_format_does_not_say(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    play = write_play(tmp_path / "play.npz")
    assert main(["data", "convert", play, str(tmp_path / "no")]) == 2
    assert "--fps" in capsys.readouterr().err
    assert main(["data", "convert", play, str(tmp_path / "new"), "--fps", "20"]) == 0
    assert main(["data", "inspect", str(tmp_path / "new")]) == 0
    assert "2 episodes, 6 steps, 20 fps" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--cameras", "top"], ["--filter-key", "train"], ["--fps", "-1"]])
def test_an_option_that_does_not_fit_is_no_fault_of_the_data(tmp_path, capsys, flags):
    assert main(["data", "inspect", write_play(tmp_path / "play.npz"), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert flags[0].removeprefix("--").replace("-", "_") in shown.err


def test_a_camera_that_no_episode_has_is_no_fault_of_the_data(folder, capsys):
    assert main(["data", "inspect", str(folder), "--cameras", "wrist"]) == 2
    assert "images/wrist: no such camera; the episode has top" in capsys.readouterr().err


def test_success_that_the_format_does_not_say(folder, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    episode = hdf5.read_episode(hdf5.episode_path(folder, 1))
    hdf5.write_episode(hdf5.episode_path(folder, 1), dataclasses.replace(episode, success=None))
    command = ["data", "convert", str(folder), str(tmp_path / "new"), "--fps", "5", "--pictures", "png"]
    assert main(command) == 2
    assert "--success" in capsys.readouterr().err
    assert main([*command, "--success", "False"]) == 0
    assert [LeRobotSource(tmp_path / "new").info(index).success for index in (0, 1)] == [True, False]


@pytest.mark.parametrize("success", [True, False])
def test_stated_success_ends_the_task_at_the_last_step(folder, tmp_path, success):
    for number in (0, 1):
        episode = hdf5.read_episode(hdf5.episode_path(folder, number))
        hdf5.write_episode(hdf5.episode_path(folder, number), dataclasses.replace(episode, success=None))
    new = tmp_path / "new"
    assert main(["data", "convert", str(folder), str(new), "--to", "hdf5", "--success", str(success)]) == 0
    episode = hdf5.read_episode(hdf5.episode_path(new, 1))
    assert (episode.success, episode.terminals.tolist()) == (success, [False] * 4 + [success])


def test_an_empty_folder_as_json(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["data", "inspect", str(tmp_path / "empty"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["contents"] is None
    assert "an empty folder" in found["problems"][0]["text"]


def test_json_has_null_where_a_statistic_does_not_exist(folder, capsys, monkeypatch):
    found = inspection.inspect(folder)
    wide = dataclasses.replace(found.contents.state, std=[float("nan"), float("inf")])
    found = dataclasses.replace(found, contents=dataclasses.replace(found.contents, state=wide))
    monkeypatch.setattr(inspection, "inspect", lambda *args, **options: found)
    assert main(["data", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contents"]["state"]["std"] == [None, None]


def test_cache_of_the_episodes_that_can_be_used(folder, capsys, tmp_path):
    bad = hdf5.episode_path(folder, 1)
    bad.write_bytes(bad.read_bytes()[:500])
    command = ["data", "cache", str(folder), str(tmp_path / "frames"), "--height", "4", "--width", "4"]
    assert main(command) == 2
    assert "truncated" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="episode left out"):
        assert main([*command, "--on-bad-episode", "skip"]) == 0
    assert "1 of 1 records are missing" in capsys.readouterr().out


def test_convert_and_inspect_again(folder, capsys, tmp_path):
    pytest.importorskip("pyarrow")
    new = tmp_path / "new"
    assert main(["data", "convert", str(folder), str(new), "--fps", "5", "--pictures", "png"]) == 0
    assert "2 episodes, 10 steps" in capsys.readouterr().out
    assert main(["data", "inspect", str(new)]) == 0
    assert "lerobot v3.0, 2 episodes, 10 steps, 5 fps" in capsys.readouterr().out
    assert main(["data", "convert", str(new), str(tmp_path / "back"), "--to", "hdf5"]) == 0
    assert len(list((tmp_path / "back").glob("*.hdf5"))) == 2


def test_cache_tells_its_size_first(folder, capsys, tmp_path):
    frames = tmp_path / "frames"
    assert main(["data", "cache", str(folder), str(frames), "--height", "4", "--width", "4"]) == 0
    assert "2 of 2 records are missing" in capsys.readouterr().out
    records = list(frames.rglob("*.npy"))
    assert sum(path.stat().st_size for path in records) == 2 * (5 * 4 * 4 * 3 + 128)
    assert main(["data", "cache", str(folder), str(frames), "--height", "4", "--width", "4"]) == 0
    assert "0 of 2 records are missing" in capsys.readouterr().out
