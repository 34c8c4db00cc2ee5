import dataclasses
import os

import h5py
import numpy as np
import pytest

from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import EpisodeSource, EpisodeStore
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.types import Episode


def make_episode(length=4, state_dim=3, cameras=("top",), seed=0, success=True) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        state=rng.normal(size=(length, state_dim)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=np.where(np.arange(length) == length - 1, 0, -1).astype(np.float32),
        terminals=np.arange(length) == length - 1,
        task="öffne die Schublade",
        images={camera: rng.integers(0, 256, (length, 5, 6, 3), np.uint8) for camera in cameras},
        success=success,
    )


def assert_same(found: Episode, expected: Episode):
    for key in ("state", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(getattr(found, key), getattr(expected, key))
        assert getattr(found, key).dtype == getattr(expected, key).dtype
    assert found.images.keys() == expected.images.keys()
    for camera, frames in expected.images.items():
        np.testing.assert_array_equal(found.images[camera], frames)
    assert (found.task, found.task_changes, found.success) == (expected.task, expected.task_changes, expected.success)


@pytest.mark.parametrize("success", [True, False, None])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_round_trip(tmp_path, success, compression):
    episode = make_episode(cameras=("top", "wrist"), success=success)
    path = hdf5.write_episode(tmp_path / "new" / "episode_000007.hdf5", episode, {"seed": 3}, compression=compression)
    found = hdf5.read_episode(path)
    assert_same(found, episode)
    assert found.source == str(path)
    assert hdf5.read_metadata(path) == {"seed": 3}


def test_an_instruction_that_changes(tmp_path):
    episode = dataclasses.replace(make_episode(), task_changes=((1, "schließe sie"), (3, "öffne die Schublade")))
    path = hdf5.write_episode(tmp_path / "episode_0.hdf5", episode)
    assert_same(hdf5.read_episode(path), episode)
    for _ in range(2):  # the second time from the cache
        source = hdf5.H5DatasetReader(tmp_path, metadata_cache=MetadataCache(tmp_path / "cache"))
        assert_same(source.episode(0), episode)
        assert source.info(0).task_changes == episode.task_changes
    with pytest.raises(ValueError, match=r"task_changes: expected texts behind rising steps in 1\.\.3, found .*4"):
        hdf5.write_episode(tmp_path / "episode_1.hdf5", dataclasses.replace(episode, task_changes=((4, "wait"),)))
    edit(path, replace("task_index", np.array([0, 2, 1, 1])))
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: task_index: expected numbers of the 2 texts in tasks, .*2"):
        hdf5.read_episode(path)


@pytest.mark.parametrize(("compression", "chunks"), [(None, None), ("gzip", (1, 5, 6, 3))])
def test_a_window_reads_no_more_frames_than_asked_for(tmp_path, compression, chunks):
    path = hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode(), compression=compression)
    with h5py.File(path) as file:
        assert file["observations/images/top"].chunks == chunks  # None: contiguous, and read by mapping the file


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(key, values):
    def change(file):
        del file[key]
        file[key] = values

    return change


def remove(key):
    return lambda file: file.__delitem__(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("actions"), "actions: expected a dataset, found nothing"),
        (remove("observations/state"), "observations/state: expected a dataset, found nothing"),
        (remove("observations"), "observations/state: expected a dataset, found nothing"),
        (replace("rewards", np.zeros(3, np.float32)), r"rewards: expected 4 rows \(as in actions\), found 3"),
        (replace("rewards", np.zeros((4, 1), np.float32)), r"rewards: expected 1 axes, found shape \(4, 1\)"),
        (replace("rewards", np.zeros(4, np.int64)), "rewards: expected float32, found int64"),
        (replace("terminals", np.zeros(4, np.float32)), "terminals: expected bool, found float32"),
        (
            replace("actions", np.full((4, 2), np.nan, np.float32)),
            "actions: expected finite float32 numbers, .* in row 0",
        ),
        (
            replace("observations/state", np.array([[0.0] * 3] * 3 + [[0, np.inf, 0]], np.float32)),
            "observations/state: expected finite float32 numbers, .* in row 3",
        ),
        (replace("observations/images/top", np.zeros((4, 5, 6, 1), np.uint8)), "images/top: expected uint8"),
        (replace("observations/images/top", np.zeros((3, 5, 6, 3), np.uint8)), "images/top: expected 4 rows"),
        (lambda file: file.attrs.__delitem__("format"), "expected the attribute format='acrlpd'"),
        (lambda file: file.attrs.__delitem__("task"), "expected the attribute 'task'"),
        (lambda file: file.attrs.__setitem__("version", 2), "expected version=1, found .*2"),
    ],
)
def test_a_broken_file_is_named_with_its_key(tmp_path, change, message):
    path = hdf5.write_episode(tmp_path / "episode_000001.hdf5", make_episode())
    edit(path, change)
    with pytest.raises(ValueError, match=rf"episode_000001\.hdf5: .*{message}"):
        hdf5.read_episode(path)


def test_an_empty_episode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: actions: expected at least 1 step, found 0"):
        hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode(length=0, cameras=()))
    path = hdf5.write_episode(tmp_path / "episode_1.hdf5", make_episode(cameras=()))
    for key, shape in {"actions": (0, 2), "observations/state": (0, 3)}.items():
        edit(path, replace(key, np.zeros(shape, np.float32)))
    with pytest.raises(ValueError, match=r"episode_1\.hdf5: rewards: expected 0 rows"):
        H5DatasetReader(tmp_path)
    for key, dtype in {"rewards": np.float32, "terminals": bool}.items():
        edit(path, replace(key, np.zeros(0, dtype)))
    with pytest.raises(ValueError, match=r"episode_1\.hdf5: expected at least 1 step, found 0"):
        H5DatasetReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: expected a complete HDF5 file"):
        hdf5.read_episode(path)


def test_what_would_not_be_read_is_not_written(tmp_path):
    episode = make_episode()
    broken = dataclasses.replace(episode, rewards=np.full(4, np.nan, np.float32))
    with pytest.raises(ValueError, match="rewards: expected finite"):
        hdf5.write_episode(tmp_path / "episode_0.hdf5", broken)
    with pytest.raises(ValueError, match=r"state: expected finite float32 numbers, found 1e\+300 in row 0"):
        hdf5.write_episode(tmp_path / "episode_0.hdf5", dataclasses.replace(episode, state=np.full((4, 3), 1e300)))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_before_the_rename_leaves_the_old_episode(tmp_path, monkeypatch):
    old, new = make_episode(seed=1), make_episode(seed=2)
    path = hdf5.write_episode(tmp_path / "episode_0.hdf5", old)

    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        hdf5.write_episode(path, new)
    with pytest.raises(KeyboardInterrupt):
        hdf5.write_episode(tmp_path / "episode_1.hdf5", new)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(hdf5.read_episode(path), old)


def test_reader_orders_by_number_and_is_a_source(tmp_path):
    lengths = {2: 3, 10: 5, 1: 4}
    for number, length in lengths.items():
        hdf5.write_episode(tmp_path / f"episode_{number}.hdf5", make_episode(length, seed=number, success=None))
    (tmp_path / ".episode_3.hdf5.99.tmp").write_bytes(b"half")
    reader = H5DatasetReader(tmp_path)
    assert isinstance(reader, EpisodeSource)
    assert (reader.format, reader.indices, reader.skipped) == ("acrlpd", (0, 1, 2), [])
    assert reader.lengths.tolist() == [4, 3, 5]
    assert (len(reader), reader.num_episodes, reader.state_dim, reader.action_dim) == (3, 3, 3, 2)
    assert reader.cameras == ("top",)
    assert_same(reader.episode(2), make_episode(5, seed=10, success=None))
    assert [len(episode) for episode in reader] == [4, 3, 5]
    assert reader.info(1).length == 3
    assert reader.info(1).success is None
    assert reader.info(1).source.endswith("episode_2.hdf5")


def test_window_reads_the_rows_of_one_key(tmp_path):
    episode = make_episode(6)
    hdf5.write_episode(tmp_path / "episode_0.hdf5", episode)
    reader, store = H5DatasetReader(tmp_path), EpisodeStore.from_episodes([episode])
    for key in ("state", "actions", "rewards", "terminals", "images/top"):
        np.testing.assert_array_equal(reader.window(0, key, 2, 5), store.window(0, key, 2, 5))
    with pytest.raises(IndexError, match=r"episode_0\.hdf5: window 2\.\.7 leaves the episode \(0\.\.6\)"):
        reader.window(0, "state", 2, 7)
    with pytest.raises(
        KeyError, match=r"episode_0\.hdf5: no key 'images/wrist'; it has state, actions, rewards, terminals, images/top"
    ):
        reader.window(0, "images/wrist", 0, 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_episode(state_dim=4),
            r"observations/state: expected .*\(3,\).* as in .*episode_0.hdf5.*, found .*\(4,\)",
        ),
        (
            make_episode(cameras=("wrist",)),
            r"images/top: expected .*\(5, 6, 3\).* as in .*episode_0.hdf5.*, found nothing",
        ),
    ],
)
def test_episodes_of_different_dimensions_are_refused(tmp_path, other, message):
    hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode())
    hdf5.write_episode(tmp_path / "episode_1.hdf5", other)
    with pytest.raises(ValueError, match=rf"episode_1\.hdf5: {message}"):
        H5DatasetReader(tmp_path)


def test_the_odd_one_out_is_the_bad_one(tmp_path):
    for number, state_dim in enumerate((4, 3, 3)):
        hdf5.write_episode(tmp_path / f"episode_{number}.hdf5", make_episode(state_dim=state_dim))
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: observations/state: expected .*\(3,\)"):
        H5DatasetReader(tmp_path)


def test_skipping_warns_counts_and_keeps_the_order(tmp_path):
    for number in range(4):
        hdf5.write_episode(tmp_path / f"episode_{number}.hdf5", make_episode(number + 2))
    edit(tmp_path / "episode_1.hdf5", remove("actions"))
    with pytest.warns(UserWarning, match="left out") as said:
        reader = H5DatasetReader(tmp_path, on_bad_episode="skip")
    assert (reader.indices, reader.lengths.tolist()) == ((0, 2, 3), [2, 4, 5])
    [(name, reason)] = reader.skipped
    assert name.endswith("episode_1.hdf5")
    assert "actions: expected a dataset, found nothing" in reason
    assert [reason in str(said[0].message), "1 of 4 episodes were left out" in str(said[1].message)] == [True, True]
    for number in (0, 2, 3):
        edit(tmp_path / f"episode_{number}.hdf5", remove("actions"))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(
            ValueError, match=r"no episode is left, all 4 were skipped; the first: .*episode_0\.hdf5: actions"
        ),
    ):
        H5DatasetReader(tmp_path, on_bad_episode="skip")
    with pytest.raises(ValueError, match="on_bad_episode must be 'error' or 'skip', got 'ignore'"):
        H5DatasetReader(tmp_path, on_bad_episode="ignore")


def test_plain_pictures_are_read_without_hdf5(tmp_path, monkeypatch):
    path = hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode(6))
    with h5py.File(path) as file:
        expected = file["observations/images/top"][2:5]
    reader = H5DatasetReader(tmp_path)
    monkeypatch.setattr(h5py, "File", None)  # HDF5 is not asked any more
    np.testing.assert_array_equal(reader.window(0, "images/top", 2, 5), expected)
    assert reader.window(0, "images/top", 6, 6).shape == (0, *expected.shape[1:])


def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(tmp_path):
    plain, message = r"observations/images/top: rows 2\.\.5 cannot be read any more", "expected a complete HDF5 file"
    for compression, told in ((None, plain), ("gzip", message)):
        path = hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode(6), compression=compression)
        reader = H5DatasetReader(tmp_path)
        before = reader.window(0, "actions", 2, 5)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"episode_0\.hdf5: {told}"):
            reader.window(0, "images/top", 2, 5)
        np.testing.assert_array_equal(reader.window(0, "actions", 2, 5), before)  # numbers were read at the opening


def test_folders_without_episodes(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        H5DatasetReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected files named episode_\*\.hdf5, .*found none"):
        H5DatasetReader(tmp_path)
    with h5py.File(tmp_path / "table_0.hdf5", "w") as file:
        file["rows"] = np.zeros((3, 7))
    with pytest.raises(ValueError, match=r"table_0\.hdf5: expected the layout of .*, found the keys \['rows'\]"):
        H5DatasetReader(tmp_path)
    hdf5.write_episode(tmp_path / "all.hdf5", make_episode())
    with pytest.raises(ValueError, match=r"names that end in a number, found \['all\.hdf5'\]"):
        H5DatasetReader(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_key": "train"}, r"filter_key does not apply to the layout found here \(acrlpd\)"),
        ({"drop_idle": True}, "drop_idle does not apply"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"state_keys": []}, "state_keys names no key"),
        ({"cameras": ["wrist"]}, r"episode_0\.hdf5: images/wrist: no such camera; the episode has top"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, message):
    hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode())
    with pytest.raises(ValueError, match=message):
        H5DatasetReader(tmp_path, **options)


def test_cameras_are_chosen(tmp_path):
    hdf5.write_episode(tmp_path / "episode_0.hdf5", make_episode(cameras=("top", "wrist")))
    assert H5DatasetReader(tmp_path).cameras == ("top", "wrist")
    assert H5DatasetReader(tmp_path, cameras=["wrist"]).episode(0).images.keys() == {"wrist"}
    assert H5DatasetReader(tmp_path, cameras=[]).episode(0).images == {}


def test_our_own_rewards_are_given_as_stored_unless_sparse_ones_are_asked_for(tmp_path):
    episode = dataclasses.replace(make_episode(), rewards=np.array([-1, 0, -1, 0], np.float32))
    episode = dataclasses.replace(episode, terminals=np.array([False, True, False, False]), success=False)
    hdf5.write_episode(tmp_path / "episode_0.hdf5", episode)
    for config in (None, RewardConfig()):
        found = H5DatasetReader(tmp_path, rewards=config).episode(0)
        np.testing.assert_array_equal(found.rewards, episode.rewards)
        np.testing.assert_array_equal(found.terminals, episode.terminals)
    found = H5DatasetReader(tmp_path, rewards=RewardConfig(source="sparse", convention="0/1")).episode(0)
    assert (found.rewards.tolist(), found.terminals.any()) == ([0, 0, 0, 0], False)


def test_a_success_reward_decides_on_rewards_and_terminals_of_our_own_files(tmp_path):
    dense = np.array([0, 2, 3, 1], np.float32)
    episode = dataclasses.replace(make_episode(success=None), rewards=dense)
    hdf5.write_episode(tmp_path / "episode_0.hdf5", episode)
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: rewards: .* up to 3\."):
        H5DatasetReader(tmp_path, rewards=RewardConfig())
    cases = {
        RewardConfig(success_reward=3.0): ([-1, -1, 0, -1], [False, False, True, False], True),
        RewardConfig(convention="as_stored"): (dense.tolist(), [False, False, False, True], None),
        RewardConfig(convention="as_stored", success_reward=3.0): (dense.tolist(), [False, False, True, False], True),
    }
    for config, expected in cases.items():
        found = H5DatasetReader(tmp_path, rewards=config).episode(0)
        assert (found.rewards.tolist(), found.terminals.tolist(), found.success) == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"episode_5\.hdf5: no such file"):
        hdf5.read_episode(tmp_path / "episode_5.hdf5")


@pytest.mark.slow
def test_processes_find_out_the_same(tmp_path, monkeypatch):
    for number in range(4):
        hdf5.write_episode(hdf5.episode_path(tmp_path, number), make_episode(3 + number))
    bad = hdf5.episode_path(tmp_path, 2)
    bad.write_bytes(bad.read_bytes()[:300])
    monkeypatch.setattr(hdf5, "PARALLEL_FROM", 1)
    monkeypatch.setattr(hdf5, "SCANNED_AT_ONCE", 1)
    with pytest.warns(UserWarning, match="episode left out"):
        here, there = (
            H5DatasetReader(tmp_path, on_bad_episode="skip", num_workers=num_workers) for num_workers in (0, 2)
        )
    assert here.skipped == there.skipped
    assert [here.info(index) for index in range(3)] == [there.info(index) for index in range(3)]
    np.testing.assert_array_equal(there.episode(2).state, here.episode(2).state)
    with pytest.raises(ValueError, match=r"episode_000002\.hdf5: expected a complete HDF5 file"):
        H5DatasetReader(tmp_path, num_workers=1)


@pytest.mark.parametrize(
    ("times", "fault"),
    [
        ([0, 66, 140, 200], None),
        (None, None),
        ([0, 66, 60, 200], "found 66 ms in row 1 and 60 ms in row 2"),
        ([0, 66, 66, 200], "found 66 ms in row 1 and 66 ms in row 2"),
        ([0, 66, 140], "expected 4 rows"),
    ],
)
def test_droid_steps_follow_one_another(tmp_path, times, fault):
    path = tmp_path / "success/2023-07-07/one/trajectory.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for key, width in {"robot_state/joint_positions": (7,), "robot_state/gripper_position": ()}.items():
            file[f"observation/{key}"] = np.zeros((4, *width))
        file["action/joint_velocity"], file["action/gripper_position"] = np.zeros((4, 7)), np.zeros(4)
        file.create_group("observation/camera_type")
        if times is not None:
            file["observation/timestamp/control/step_start"] = np.array(times, np.uint64)
    if fault is None:
        assert H5DatasetReader(tmp_path).lengths.tolist() == [4]
    else:
        with pytest.raises(ValueError, match=rf"trajectory\.h5: observation/timestamp/control/step_start: .*{fault}"):
            H5DatasetReader(tmp_path)
