"""Minari datasets through a stand-in for the library, with the attributes of the real one (0.5.4)."""

import sys
import types

import h5py
import numpy as np
import pytest

from acrlpd.data import sources
from acrlpd.data.formats.rewards import RewardConfig


def episode(number, length, *, terminated):
    rng = np.random.default_rng(number)
    observations = {
        "observation": rng.normal(size=(length + 1, 3)),
        "goal": {"place": rng.normal(size=(length + 1, 2)), "angle": rng.normal(size=length + 1)},
        "camera": rng.integers(0, 256, (length + 1, 4, 5, 3), np.uint8),
    }
    return types.SimpleNamespace(
        id=number,
        observations=observations,
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=np.arange(length) == (length - 1 if terminated else -1),
        terminations=np.arange(length) == (length - 1 if terminated else -1),
        truncations=np.arange(length) == (-1 if terminated else length - 1),
        infos={"success": np.arange(length + 1) == (length if terminated else -1)},
    )


class StandIn(list):
    total_episodes = 2
    storage = types.SimpleNamespace(data_path="/nowhere")

    def iterate_episodes(self):
        return iter(self)


@pytest.fixture
def library(monkeypatch):
    """The episodes that the stand-in hands out, and where it was asked to look."""
    dataset = StandIn([episode(0, 4, terminated=True), episode(1, 6, terminated=False)])
    asked = []

    def opened(where):
        asked.append(str(where))
        return dataset

    monkeypatch.setitem(sys.modules, "minari", types.SimpleNamespace(load_dataset=opened, MinariDataset=opened))
    return dataset, asked


def test_rows_pair_an_observation_with_the_action_taken_there(library):
    dataset, asked = library
    found = sources.open_episodes("minari:D4RL/door/human-v2", default_task="open the door")
    assert asked == ["D4RL/door/human-v2"]
    assert (found.format, found.lengths.tolist(), found.cameras) == ("minari", [4, 6], ("camera",))
    parts = dataset[1].observations
    states = np.column_stack([parts["goal"]["angle"], parts["goal"]["place"], parts["observation"]])
    second = found.episode(1)
    np.testing.assert_array_equal(second.state, states[:6].astype(np.float32))
    np.testing.assert_array_equal(second.final.state, states[6].astype(np.float32))
    np.testing.assert_array_equal(second.final.images["camera"], parts["camera"][6])
    np.testing.assert_array_equal(second.images["camera"], parts["camera"][:6])
    np.testing.assert_array_equal(second.actions, dataset[1].actions)
    assert not second.terminals.any()  # cut by a time limit
    assert found.episode(0).terminals.tolist() == [False, False, False, True]
    assert [found.info(index).success for index in range(2)] == [True, False]
    assert found.info(0).task == "open the door"


def test_options(library, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{}")
    found = sources.open_episodes(tmp_path, state_keys=["observation"], rewards=RewardConfig(convention="-1/0"))
    assert library[1] == [str(tmp_path / "data")]
    assert found.episode(0).state.shape == (4, 3)
    assert found.episode(0).rewards.tolist() == [-1, -1, -1, 0]
    with pytest.raises(ValueError, match=r"episode 0: state: .*speed.* among the observations observation, goal/place"):
        sources.open_episodes(tmp_path, state_keys=["speed"])


def test_a_bad_episode_is_named_or_left_out(library):
    library[0][1].actions[2] = np.nan
    with pytest.raises(ValueError, match="minari:x: episode 1: actions holds a number that is not finite"):
        sources.open_episodes("minari:x")
    with pytest.warns(UserWarning, match="episode left out"):
        assert sources.open_episodes("minari:x", on_bad_episode="skip").num_episodes == 1


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[minari\]'"):
        sources.open_episodes("minari:D4RL/door/human-v2")


@pytest.mark.usefixtures("library")
def test_the_rate_is_what_the_user_says():
    assert sources.open_episodes("minari:some/set-v0", default_task="go").fps is None
    assert sources.open_episodes("minari:some/set-v0", fps=25).fps == 25
    with pytest.raises(ValueError, match="fps must be positive, got inf"):
        sources.open_episodes("minari:some/set-v0", fps=float("inf"))


def test_dense_rewards_keep_their_numbers_and_the_terminations(library):
    dataset, _ = library
    for each in dataset:
        each.rewards, each.infos = np.arange(len(each.actions)) * 0.5, {}
    found = sources.open_episodes("minari:a/b-v0", rewards=RewardConfig(convention="as_stored"))
    assert [found.episode(index).rewards.max() for index in range(2)] == [1.5, 2.5]
    assert [found.episode(index).terminals.tolist() for index in range(2)] == [[False] * 3 + [True], [False] * 6]


def test_numbers_that_are_not_there_are_an_error(library, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{}")
    with h5py.File(tmp_path / "data/main_data.hdf5", "w") as file:
        file["episode_0/actions"] = np.zeros((4, 2))
        file.create_dataset("episode_0/rewards", (4,), float)
    with pytest.raises(ValueError, match=r"main_data\.hdf5: episode_0/rewards: its 4 rows were never written"):
        sources.open_episodes(tmp_path)
