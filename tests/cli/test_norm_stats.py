import dataclasses
import json

import numpy as np
import pytest

from acrlpd.cli.main import main
from acrlpd.data import statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.video import VideoReaders
from acrlpd.data.sources import open_episodes
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.tools import convert
from acrlpd.data.view import normalize
from acrlpd.data.view.transforms import DeltaActions
from acrlpd.types import Episode

KEYS, NAMES = ("state", "actions"), ("mean", "std", "q01", "q99")


def walk(seed, length):
    """An episode that drifts, so that later ones leave the range of the first; the last state hardly moves."""
    rng = np.random.default_rng(seed)
    state = np.cumsum(rng.normal(size=(length, 3)), axis=0) * [1.0, 10.0, 1e-6] + [0.0, 5.0, 1000.0]
    actions = rng.normal(size=(length, 2)) ** 3
    return Episode(
        state=state.astype(np.float32),
        actions=actions.astype(np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        task="walk",
    )


@pytest.fixture(scope="module")
def episodes():
    return [walk(seed, length) for seed, length in enumerate([300, 1, 500, 40])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, episodes):
    path = tmp_path_factory.mktemp("walks")
    for number, episode in enumerate(episodes):
        hdf5.write_episode(hdf5.episode_path(path, number), episode, {})
    return path


def compare(stats, values):
    """Moments and quantiles as numpy has them in float64, which are those of training on data in memory."""
    for key in KEYS:
        exact = values[key].astype(np.float64)
        np.testing.assert_allclose(stats[key].mean, exact.mean(axis=0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats[key].std, exact.std(axis=0), rtol=1e-6, atol=1e-6)
        for name, q in (("q01", 0.01), ("q99", 0.99)):
            np.testing.assert_allclose(getattr(stats[key], name), np.quantile(exact, q, axis=0), rtol=1e-6)


def test_statistics_of_all_episodes_reach_the_file(folder, episodes, tmp_path, capsys):
    out = tmp_path / "assets" / "robot"
    arguments = ["norm-stats", str(folder), "--out", str(out), "--json", "--min_std", "0"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    values = {key: np.concatenate([getattr(episode, key) for episode in episodes]) for key in KEYS}
    compare(normalize.load(out), values)
    assert printed["norm_stats"] == json.loads((out / "norm_stats.json").read_text())["norm_stats"]
    assert (printed["num_episodes"], printed["num_steps"]) == (4, 841)
    assert [path.name for path in out.iterdir()] == ["norm_stats.json"]
    assert main(arguments) == 0  # it may be made again


def test_dimensions_that_hardly_move_are_named(folder, caplog, capsys):
    assert main(["norm-stats", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    [warning] = [message for message in printed["warnings"] if "rarely move" in message]
    assert warning.startswith("state: 1 of 3 dimensions (2) hardly or rarely move")
    assert warning in caplog.messages
    assert printed["norm_stats"]["state"]["std"][2] == statistics.MIN_STD
    assert printed["file"] is None


def test_table_names_every_dimension(folder, capsys):
    assert main(["norm-stats", str(folder), "--min_std", "0"]) == 0
    output = capsys.readouterr().out
    assert "4 episodes, 841 steps" in output
    assert [line.split()[0] for line in output.splitlines()[2:7]] == [
        *("state[0]", "state[1]", "state[2]"), *("actions[0]", "actions[1]"),
    ]  # fmt: skip
    assert "not written" in output


def test_chunks_and_relative_actions(folder, episodes, capsys):
    """As the training's own exact statistics of the same chunks, repeated last actions included."""
    arguments = ["--horizon", "3", "--delta_mask", "1", "-1", "--min_std", "0", "--json"]
    assert main(["norm-stats", str(folder), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)["norm_stats"]
    store = EpisodeStore.from_episodes(episodes)
    expected = statistics.from_store(store, DeltaActions((True, False)), horizon=3, min_std=0.0)
    for name in ("mean", "std"):
        np.testing.assert_allclose(printed["actions"][name], getattr(expected["actions"], name), rtol=1e-5)
    assert not np.allclose(printed["actions"]["std"], store.actions.std(axis=0), rtol=0.1)


def test_part_of_the_episodes(folder, episodes, capsys):
    assert main(["norm-stats", str(folder), "--num_episodes", "2", "--min_std", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["norm_stats"]
    ends = np.concatenate([episodes[0].state, episodes[-1].state]).astype(np.float64)
    np.testing.assert_allclose(printed["state"]["mean"], ends.mean(axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    ("flag", "values", "complaint"),
    [
        ("--min_std", ("nan", "inf", "-1"), "min_std must be a number of at least 0, got"),
        ("--num_episodes", ("0", "-2"), "num_episodes must be a whole number of at least 1 or None, got"),
    ],
)
def test_numbers_without_meaning_are_refused(folder, capsys, flag, values, complaint):
    for value in values:
        assert main(["norm-stats", str(folder), flag, value]) == 2
        assert complaint in capsys.readouterr().err


def printed_means(capsys, *arguments):
    assert main(["norm-stats", *map(str, arguments), "--min_std", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["norm_stats"]
    return tuple(np.array(printed[key]["mean"]) for key in KEYS)


@pytest.mark.parametrize(
    ("robot", "sizes", "num_relative"),
    [
        (["--robot", "droid"], (8, 8), 0),
        (["--robot", "libero"], (8, 7), 6),
        (["--robot", "libero", "--pi05"], (8, 7), 0),
        (["--robot", "libero", "--delta_mask", "2"], (8, 7), 2),
        (["--robot", "droid", "--delta", "7", "-1"], (8, 8), 7),
    ],
)
def test_robots_have_the_actions_that_openpi_trained_with(robot, sizes, num_relative, tmp_path, capsys):
    """Their numbers stay as they are, but for the state that is taken off."""
    episode = walk_of(*sizes)
    hdf5.write_episode(hdf5.episode_path(tmp_path, 0), episode, {})
    state, actions = printed_means(capsys, tmp_path, *robot)
    np.testing.assert_allclose(state, episode.state.mean(axis=0), rtol=1e-4)
    relative = episode.actions.copy()
    relative[:, :num_relative] -= episode.state[:, :num_relative]
    np.testing.assert_allclose(actions, relative.mean(axis=0), rtol=1e-4)


def test_aloha_has_pi0s_units_and_relative_joints(tmp_path, capsys):
    episode = walk_of(14, 14)
    hdf5.write_episode(hdf5.episode_path(tmp_path, 0), episode, {})
    state, actions = printed_means(capsys, tmp_path, "--robot", "aloha")
    joints, signs = [0, 1, 2, 7, 8, 9], [1, -1, -1, 1, -1, -1]
    np.testing.assert_allclose(state[joints], episode.state.mean(axis=0)[joints] * signs, rtol=1e-4)
    relative = (episode.actions - episode.state).mean(axis=0)
    np.testing.assert_allclose(actions[joints], relative[joints] * signs, rtol=1e-4)
    angle = actions[6] + 0.5476  # absolute, counted from where pi0 has the gripper closed
    np.testing.assert_allclose(angle, episode.actions[:, 6].mean() * (1.4910 + 0.6213) - 0.6213, rtol=1e-4)


def test_no_video_is_opened(tmp_path, capsys):
    """What is there in their places cannot be opened."""
    rng = np.random.default_rng(0)
    pictures = {"top": rng.integers(0, 256, (50, 64, 64, 3), np.uint8)}
    episode = dataclasses.replace(walk_of(8, 7), images=pictures)
    convert.to_lerobot(EpisodeStore.from_episodes([episode, episode]), tmp_path / "set", fps=10.0)
    for video in (tmp_path / "set").rglob("*.mp4"):
        video.write_bytes(b"no video")
    state, _ = printed_means(capsys, tmp_path / "set", "--robot", "libero")
    np.testing.assert_allclose(state, episode.state.mean(axis=0), rtol=1e-4)


def walk_of(state_dim, action_dim):
    rng = np.random.default_rng(0)
    length = 50
    return Episode(
        state=rng.uniform(0.1, 0.9, (length, state_dim)).astype(np.float32),
        actions=rng.uniform(1.1, 1.9, (length, action_dim)).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        task="walk",
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{tmp}/nowhere"], "no such file or folder"),
        (["{tmp}"], "an empty folder"),
        (["{folder}", "--delta", "3"], "delta_mask names 3 dimensions, but state and actions have 3 and 2"),
        (["{folder}", "--horizon", "0"], "horizon must be a whole number of at least 1"),
        (["{folder}", "--robot", "aloha"], "robot='aloha' needs 14 state and 14 action dimensions"),
        (["{folder}", "--robot", "droid"], "robot='droid' needs 8 state and 8 action dimensions"),
        (["{folder}", "--robot", "libero"], "or leave robot out (--robot None)"),
    ],
)
def test_mistakes_are_explained(arguments, complaint, folder, tmp_path, capsys):
    paths = {"tmp": str(tmp_path), "folder": str(folder)}
    assert main(["norm-stats", *(argument.format(**paths) for argument in arguments)]) == 2
    assert complaint in capsys.readouterr().err


# -- recorded data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lerobot_sets(shared):
    found = sorted(path.parents[1] for path in (shared / "data").rglob("meta/info.json"))
    if not found:
        pytest.skip("these reference files have no LeRobot sets")
    return found


@pytest.mark.reference
def test_lerobot_sets_without_decoding_a_frame(lerobot_sets, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise AssertionError("a video was decoded")

    monkeypatch.setattr(VideoReaders, "frames", fail)
    for path in lerobot_sets:
        assert main(["norm-stats", str(path), "--min_std", "0", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)["norm_stats"]
        source = open_episodes(path)
        values = {
            key: np.concatenate(
                [source.window(index, key, 0, length) for index, length in enumerate(source.lengths.tolist())]
            )
            for key in KEYS
        }
        compare({key: normalize.NormStats(*(np.array(printed[key][name]) for name in NAMES)) for key in KEYS}, values)


@pytest.mark.reference
def test_aloha_in_pi0s_units(lerobot_sets, capsys):
    for path in lerobot_sets:
        if open_episodes(path).window(0, "state", 0, 1).shape[1] != 14:
            continue
        stats = {}
        for robot in ("None", "aloha"):
            arguments = ["--robot", robot, "--delta_mask", "0", "--min_std", "0", "--json"]
            assert main(["norm-stats", str(path), *arguments]) == 0
            stats[robot] = json.loads(capsys.readouterr().out)["norm_stats"]
        for key in KEYS:
            ours, pi0s = (np.array(stats[robot][key]["mean"]) for robot in ("None", "aloha"))
            np.testing.assert_allclose(pi0s[[0, 1, 2]], ours[[0, 1, 2]] * [1, -1, -1], rtol=1e-5, atol=1e-7)
            assert abs(pi0s[6] - ours[6]) > 1e-3
