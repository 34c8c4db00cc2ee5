import contextlib
import zipfile

import numpy as np
import pytest

from acrlpd.data import chunks
from acrlpd.data.formats.npz import ButtonGoal, CubeGoal, NpzReader
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import EpisodeSource, EpisodeStore

GOAL = CubeGoal(((0.4, 0.0, 0.02),))


def play(path, cube_x, ends, **changes):
    """Rows whose only cube lies at ``cube_x`` (m) in front of the robot; trajectories end at the rows ``ends``."""
    rows = len(cube_x)
    qpos = np.zeros((rows, 21), np.float32)
    qpos[:, 14:17] = np.stack([cube_x, np.zeros(rows), np.full(rows, 0.02)], axis=1)
    arrays = {
        "observations": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2),
        "actions": np.linspace(-1, 1, rows, dtype=np.float32)[:, None],
        "terminals": np.isin(np.arange(rows), ends),
        "qpos": qpos,
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


CUBE_X = [0.0, 0.41, 0.9, 0.0, 0.0, 0.0, 0.4401, 0.40]  # rows 3 and 7 end trajectories; the cube is in place at 1, 7


def test_the_flagged_row_of_each_trajectory_is_dropped(tmp_path):
    reader = NpzReader(play(tmp_path / "a.npz", CUBE_X, [3, 7]), default_task="move the cube")
    assert isinstance(reader, EpisodeSource)
    assert (reader.num_episodes, reader.lengths.tolist()) == (2, [3, 3])
    assert reader.window(1, "state", 0, 3).tolist() == [[8, 9], [10, 11], [12, 13]]
    np.testing.assert_array_equal(reader.episode(0).actions[:, 0], np.linspace(-1, 1, 8, dtype=np.float32)[:3])
    info = reader.info(1)
    assert (info.task, info.success, info.source) == ("move the cube", None, f"{tmp_path / 'a.npz'}: episode 1")
    assert not reader.episode(0).terminals.any()  # the flag is a boundary, not a success
    assert not reader.episode(0).rewards.any()


def test_relabelling_puts_terminals_in_mid_episode(tmp_path):
    reader = NpzReader(play(tmp_path / "a.npz", CUBE_X, [3, 7]), goal=GOAL)
    first, second = reader.episode(0), reader.episode(1)
    assert (first.rewards.tolist(), first.terminals.tolist()) == ([-1, 0, -1], [False, True, False])
    assert (first.success, second.success) == (True, False)  # row 7 is dropped; 0.4401 is just outside of 4 cm
    batch = chunks.gather(EpisodeStore.from_source(reader), np.array([0, 2]), horizon=3)
    assert batch["valid"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["bootstrap_mask"].tolist() == [0, 1]


def test_rewards_count_the_objects_that_are_missing(tmp_path):
    buttons = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])
    path = play(tmp_path / "a.npz", [0.0] * 4, [3], button_states=buttons)
    counted = NpzReader(path, goal=ButtonGoal((1, 0))).episode(0)
    assert (counted.rewards.tolist(), counted.terminals.tolist()) == ([-2, -1, 0], [False, False, True])
    sparse = NpzReader(path, goal=ButtonGoal((1, 0)), rewards=RewardConfig(source="sparse")).episode(0)
    assert (sparse.rewards.tolist(), sparse.terminals.tolist()) == ([-1, -1, 0], [False, False, True])
    positive = NpzReader(path, goal=ButtonGoal((1, 0)), rewards=RewardConfig(source="sparse", convention="0/1"))
    assert positive.episode(0).rewards.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("goal", "rewards", "message"),
    [
        (None, RewardConfig(), r"name the goal they are for.*--data\.cube_goal.*--data\.button_goal"),
        (GOAL, RewardConfig(convention="0/1"), "ask for rewards.source='sparse'"),
        (GOAL, RewardConfig(convention="as_stored"), r"rewards\.convention 'as_stored' does not apply"),
        (GOAL, RewardConfig(success=True), r"rewards\.success does not apply"),
        (GOAL, RewardConfig(success_reward=1.0), r"rewards\.success_reward does not apply"),
        (GOAL, RewardConfig(terminal_on_failure=True), r"rewards\.terminal_on_failure does not apply"),
    ],
)
def test_rewards_that_play_data_cannot_have(tmp_path, goal, rewards, message):
    with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
        NpzReader(play(tmp_path / "a.npz", CUBE_X, [3, 7]), goal=goal, rewards=rewards)


def test_actions_are_clipped_on_request(tmp_path):
    path = play(tmp_path / "a.npz", [0.0] * 3, [2])
    assert NpzReader(path).episode(0).actions[:, 0].tolist() == [-1, 0]
    np.testing.assert_allclose(NpzReader(path, clip_actions=True).episode(0).actions[:, 0], [-1 + 1e-5, 0], rtol=1e-7)


@pytest.mark.parametrize(
    ("changes", "goal", "message"),
    [
        ({"actions": None}, None, "actions: expected an array of that name, found observations, terminals, qpos"),
        ({"actions": np.zeros((4, 2, 1))}, None, r"actions: expected numbers with 2 axes, found float64 \(4, 2, 1\)"),
        ({"actions": np.zeros((3, 2))}, None, r"actions: expected 4 rows \(as in observations\), found \(3, 2\)"),
        ({"qpos": np.zeros((3, 21))}, None, "qpos: expected 4 rows"),
        ({"terminals": np.zeros(4)}, None, "terminals: expected the last of 4 rows to be flagged"),
        (
            {"actions": np.array([[0], [np.nan], [0], [0]])},
            None,
            "episode 0: actions holds a number that is not finite",
        ),
        ({"terminals": np.array([1, 0, 0, 1])}, None, r"episode 0: the episode is empty \(0 steps\)"),
        ({"qpos": None}, GOAL, "qpos: the goal needs this array"),
        ({"qpos": np.full((4, 21), "a")}, GOAL, "qpos: the goal needs this array of numbers"),
        ({}, CubeGoal(GOAL.positions * 2), "qpos: 21 numbers a row are too few for 2 cubes"),
        ({"button_states": np.zeros((4, 9))}, ButtonGoal((1,)), "button_states: 9 buttons, but the goal names 1"),
        ({"observations": np.array([[None, 1]] * 4)}, None, "expected a complete .npz file"),
    ],
)
def test_a_broken_file_is_named_with_its_key(tmp_path, changes, goal, message):
    path = play(tmp_path / "a.npz", [0.0] * 4, [3], **changes)
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        NpzReader(path, goal=goal)


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    whole = play(tmp_path / "a.npz", [0.0] * 4, [3]).read_bytes()
    for keep in range(0, len(whole), 97):
        (tmp_path / "a.npz").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.npz: expected a complete \.npz file"):
            NpzReader(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"b\.npz: no such file"):
        NpzReader(tmp_path / "b.npz")


@pytest.mark.parametrize(("place", "value", "reason"), [(6, 109, "zip file version 10.9"), (8, 1, "encrypted")])
def test_a_wrong_byte_in_the_directory_is_an_error_that_names_the_file(tmp_path, place, value, reason):
    path = play(tmp_path / "a.npz", [0.0] * 4, [3])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = value  # version and flags of the first array
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.npz: expected a complete \.npz file.*{reason}"):
        NpzReader(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [(b"'shape': (4", b"'shape': ((", "multi-line statement"), (b"'descr': '<", b"'descr': ',", "invalid syntax")],
)
def test_a_wrong_byte_in_the_header_of_an_array_is_an_error_that_names_the_file(tmp_path, old, new, reason):
    whole = play(tmp_path / "whole.npz", [0.0] * 4, [3])
    with zipfile.ZipFile(whole) as arrays, zipfile.ZipFile(tmp_path / "a.npz", "w") as damaged:
        for name in arrays.namelist():
            damaged.writestr(name, arrays.read(name).replace(old, new))
    with pytest.raises(ValueError, match=rf"a\.npz: expected a complete \.npz file.*{reason}"):
        NpzReader(tmp_path / "a.npz")


@pytest.mark.parametrize("clip_actions", [False, True])
@pytest.mark.parametrize("key", ["actions", "observations"])
@pytest.mark.parametrize("number", [np.inf, 1e300])  # the second is beyond float32
def test_a_bad_trajectory_is_skipped_on_request(tmp_path, key, number, clip_actions):
    values = np.zeros((8, 2))
    values[1] = number
    path = play(tmp_path / "a.npz", CUBE_X, [3, 7], **{key: values})
    name = {"observations": "state"}.get(key, key)
    with pytest.raises(ValueError, match=rf"a\.npz: episode 0: {name} holds a number that is not finite"):
        NpzReader(path, clip_actions=clip_actions)
    with pytest.warns(UserWarning, match="left out"):
        reader = NpzReader(path, on_bad_episode="skip", clip_actions=clip_actions)
    assert [info.source for info in (reader.info(0),)] == [f"{path}: episode 1"]
    assert [name for name, _ in reader.skipped] == [f"{path}: episode 0"]


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("task", [1, 2])
def test_relabelling_agrees_with_ogbench(shared, task):
    ogbench = pytest.importorskip("ogbench")
    path = next(iter(sorted((shared / "data" / "ogbench").glob("cube-*-[0-9]*[0-9]k.npz"))), None)
    if path is None:
        pytest.skip(f"{shared} holds no OGBench data")
    name = f"{path.stem.rpartition('-')[0]}-singletask-task{task}-v0"
    env, data, _ = ogbench.make_env_and_datasets(name, dataset_path=str(path))
    with contextlib.closing(env):
        places = env.unwrapped._data.mocap_pos
        goal = CubeGoal(tuple(tuple(place) for place in places.tolist()))
    reader = NpzReader(path, goal=goal)
    store = EpisodeStore.from_source(reader)
    np.testing.assert_array_equal(store.state, data["observations"])
    np.testing.assert_array_equal(store.actions, data["actions"])
    np.testing.assert_array_equal(store.rewards, data["rewards"])
    np.testing.assert_array_equal(store.terminals, data["masks"] == 0)
    np.testing.assert_array_equal(store.ends - 1, np.flatnonzero(data["terminals"]))
    assert 0 < store.terminals.sum() < store.num_rows
