"""Rows gathered from mapped files are the rows that HDF5 reads."""

import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data import hdf5, mapped
from acrlpd.data.hdf5 import H5DatasetReader
from acrlpd.data.mapped import MappedRows
from acrlpd.types import Episode

LENGTHS = [7, 2, 9, 1, 5]
NUM_ROWS = sum(LENGTHS)


def write_own(folder, *, compression=None):
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        episode = Episode(
            state=rng.normal(size=(length, 3)).astype(np.float32),
            actions=rng.normal(size=(length, 2)).astype(np.float32),
            rewards=rng.normal(size=length).astype(np.float32),
            terminals=np.arange(length) == length - 1,
            task="lift",
            images={"top": rng.integers(0, 256, (length, 5, 7, 3), np.uint8)},
        )
        hdf5.write_episode(hdf5.episode_path(folder, number), episode, compression=compression)
    return folder


def write_robomimic(path, *, dtype=np.float64, chunked=()):
    """All demos in one file; the state is put together from two data sets, one of them of scalars."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number, length in enumerate(LENGTHS):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.normal(size=(length, 2)).astype(dtype)
            demo["rewards"] = np.zeros(length)
            demo["obs/place"] = rng.normal(size=(length, 3)).astype(dtype)
            grip = rng.normal(size=length).astype(dtype)
            demo.create_dataset("obs/grip", data=grip, chunks=(1,) if number in chunked else None)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return H5DatasetReader(write_own(tmp_path_factory.mktemp("own")))


def rows_of(source, key):
    return np.concatenate([source.window(index, key, 0, int(n)) for index, n in enumerate(source.lengths)])


def test_every_key_of_our_layout_is_mapped(own):
    found = own.mapped()
    assert {key for key, rows in found.items() if isinstance(rows, MappedRows)} == {"state", "actions", "images/top"}
    for key, rows in found.items():
        expected = rows_of(own, key)
        assert (len(rows), rows.shape) == (NUM_ROWS, expected.shape)
        np.testing.assert_array_equal(rows[2:20], expected[2:20])
        assert rows[np.array([3])].dtype == expected.dtype


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=20))
def test_any_rows_in_any_order(own, rows):
    wanted = np.array(rows, dtype=int)
    for key, found in own.mapped().items():
        np.testing.assert_array_equal(found[wanted], rows_of(own, key)[wanted])
        np.testing.assert_array_equal(found[wanted[:, None]], rows_of(own, key)[wanted[:, None]])


@pytest.mark.parametrize("dtype", [np.float64, ">f4", np.int32])
def test_joined_data_sets_become_float32(tmp_path, dtype):
    path = write_robomimic(tmp_path / "a.hdf5", dtype=dtype)
    source = H5DatasetReader(path, state_keys=("place", "grip"))
    found = source.mapped()
    for key in ("state", "actions"):
        assert found[key][np.array([0, 22])].dtype == np.float32
        np.testing.assert_array_equal(found[key][:], rows_of(source, key))


def test_what_does_not_lie_as_in_memory_is_left_out(tmp_path):
    chunked = H5DatasetReader(write_robomimic(tmp_path / "a.hdf5", chunked=(3,)), state_keys=("place", "grip"))
    assert set(chunked.mapped()) == {"actions", "rewards", "terminals"}
    compressed = H5DatasetReader(write_own(tmp_path / "own", compression="gzip"))
    assert set(compressed.mapped()) == {"state", "actions", "rewards", "terminals"}


def test_a_stray_row_is_an_error(own):
    for row in (-1, NUM_ROWS):
        with pytest.raises(IndexError, match=r"rows must lie in 0\.\.23"):
            own.mapped()["state"][np.array([0, row])]


def test_no_file_stays_open_and_one_may_be_replaced(tmp_path):
    source = H5DatasetReader(write_own(tmp_path))
    expected = rows_of(source, "state")
    before = len(os.listdir("/proc/self/fd"))
    found = source.mapped()
    assert len(os.listdir("/proc/self/fd")) <= before
    os.replace(hdf5.episode_path(tmp_path, 0), hdf5.episode_path(tmp_path, 2))
    np.testing.assert_array_equal(found["state"][:], expected)


def test_a_file_that_was_cut_short_before_is_named(tmp_path):
    source = H5DatasetReader(write_own(tmp_path))
    os.truncate(hdf5.episode_path(tmp_path, 3), 100)
    with pytest.raises(ValueError, match=r"episode_000003\.hdf5: .*the file is shorter than it was"):
        source.mapped()


def test_more_files_than_a_process_may_map_are_left_alone(tmp_path, monkeypatch):
    source = H5DatasetReader(write_own(tmp_path))
    monkeypatch.setattr(mapped, "MAX_FILES", 4)
    assert set(source.mapped()) == {"rewards", "terminals"}
