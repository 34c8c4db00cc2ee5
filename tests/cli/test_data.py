"""acrlpd data, as a person types it."""

import json

import numpy as np
import pytest

from acrlpd.cli.main import main
from acrlpd.data import hdf5
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
    ],
)
def test_mistakes(folder, capsys, tmp_path, arguments, hint):
    code = main([argument.format(tmp=tmp_path, set=folder) for argument in arguments])
    captured = capsys.readouterr()
    assert code != 0
    assert hint in captured.err + captured.out


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
