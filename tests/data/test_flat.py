"""Flat arrays hold what the files of a data set hold, in memory or mapped, and no damaged file ends the process."""

import copy
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.store import flat, metadata_cache, windows
from acrlpd.data.store.flat import FlatRows, is_mapped
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.types import Episode

LENGTHS = [7, 2, 9, 1, 5]
NUM_ROWS = sum(LENGTHS)
NUMBERS = {"state", "actions", "rewards", "terminals"}


@pytest.fixture
def large(monkeypatch):
    """Every number counts as large, so that it is mapped."""
    monkeypatch.setattr(FlatRows.__init__, "__kwdefaults__", {"memory_bytes": 0})


def write_own(folder, *, compression=None, skip=()):
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
        if number not in skip:
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


def expected(folder, key):
    return np.concatenate([getattr(hdf5.read_episode(path), key) for path in sorted(folder.glob("*.hdf5"))])


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), memory_bytes=st.integers(0, 200), data=st.data())
def test_any_episodes_may_be_kept(lengths, memory_bytes, data):
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(length, 3)).astype(np.float32) for length in lengths]
    blocks[0] = blocks[0][:, :1]  # of another width: it is not kept
    rows = FlatRows("state", memory_bytes=memory_bytes)
    for block in blocks:
        rows.append(block, "an episode")
    kept = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))) if len(lengths) > 1 else [0]) or [0]
    rows.keep(kept)
    whole = np.concatenate([blocks[index] for index in kept])
    found = rows.result()
    assert is_mapped(found) == (whole.nbytes > memory_bytes)
    np.testing.assert_array_equal(found, whole)
    assert (found.dtype, found.flags.writeable) == (np.float32, False)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_data_set_is_flat_in_memory_and_in_files(tmp_path, compression, large):
    folder = write_own(tmp_path / "set", compression=compression)
    cache = MetadataCache(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of files that nobody closed
        sources = [H5DatasetReader(folder), *(H5DatasetReader(folder, metadata_cache=cache) for _ in range(2))]
    for source in sources:
        assert source.flat.keys() == NUMBERS
        for key, rows in source.flat.items():
            assert is_mapped(rows)
            np.testing.assert_array_equal(rows, expected(folder, key))
            np.testing.assert_array_equal(source.window(2, key, 1, 4), expected(folder, key)[10:13])
            source.window(2, key, 1, 4)[:] = 0  # a copy
    assert {Path(rows.filename).suffix for rows in sources[2].flat.values()} == {".npy"}
    np.testing.assert_array_equal(np.load(sources[2].flat["state"].filename), expected(folder, "state"))
    assert len(list(folder.iterdir())) == len(LENGTHS)  # nothing was written beside the data


def test_small_numbers_are_in_memory_and_have_no_file_of_their_own(tmp_path):
    folder = write_own(tmp_path / "set")
    for _ in range(2):
        source = H5DatasetReader(folder, metadata_cache=MetadataCache(tmp_path / "cache"))
        assert not any(map(is_mapped, source.flat.values()))
        assert windows.open_store(source, memory_bytes=0).in_memory
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_episodes_that_are_left_out_leave_no_hole(tmp_path, large):
    folder = write_own(tmp_path / "set")
    with h5py.File(hdf5.episode_path(folder, 2), "r+") as file:  # of another width than the others
        del file["actions"]
        file["actions"] = np.zeros((9, 5), np.float32)
    os.truncate(hdf5.episode_path(folder, 0), 100)
    with pytest.warns(UserWarning, match="left out"):
        source = H5DatasetReader(folder, on_bad_episode="skip")
    without = write_own(tmp_path / "without", skip=(0, 2))
    for key, rows in source.flat.items():
        np.testing.assert_array_equal(rows, expected(without, key))


@pytest.mark.parametrize("dtype", [np.float64, ">f4", np.int32])
@pytest.mark.parametrize("chunked", [(), (3,)])
def test_joined_data_sets_become_float32(tmp_path, dtype, chunked):
    path = write_robomimic(tmp_path / "a.hdf5", dtype=dtype, chunked=chunked)
    source = H5DatasetReader(path, state_keys=("place", "grip"))
    with h5py.File(path) as file:
        demos = [file[f"data/demo_{number}/obs"] for number in range(len(LENGTHS))]
        rows = [np.column_stack([demo["place"][...], demo["grip"][...]]) for demo in demos]
    np.testing.assert_array_equal(source.flat["state"], np.concatenate(rows).astype(np.float32))
    assert source.flat["state"].dtype == source.flat["actions"].dtype == np.float32


def entry_files(cache):
    """The files of the latest entry."""
    return {path.stem: path for path in sorted(cache.folder.glob("*/*.npy"), key=lambda path: path.stat().st_ctime_ns)}


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "header", "empty"])
def test_a_damaged_file_of_ours_is_made_anew(tmp_path, large, damage):
    folder, cache = write_own(tmp_path / "set"), MetadataCache(tmp_path / "cache")
    H5DatasetReader(folder, metadata_cache=cache)
    path = entry_files(cache)["state"]
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        cut, grown, header = whole[:-4], whole + b"more", whole.replace(b"<f4", b"<i4")
        path.write_bytes({"cut": cut, "grown": grown, "header": header, "empty": b""}[damage])
    source = H5DatasetReader(folder, metadata_cache=cache)
    np.testing.assert_array_equal(source.flat["state"], expected(folder, "state"))
    assert entry_files(cache)["state"].read_bytes() == whole


def test_a_changed_data_set_is_read_anew_while_the_old_numbers_stay_mapped(tmp_path, large):
    folder, cache = write_own(tmp_path / "set"), MetadataCache(tmp_path / "cache")
    before = H5DatasetReader(folder, metadata_cache=cache)
    old = expected(folder, "state")
    hdf5.episode_path(folder, 1).unlink()
    after = H5DatasetReader(folder, metadata_cache=cache)
    np.testing.assert_array_equal(after.flat["state"], expected(folder, "state"))
    shutil.rmtree(cache.folder)
    np.testing.assert_array_equal(before.flat["state"], old)


def test_only_old_folders_that_no_entry_names_are_removed(tmp_path, large):
    """Two processes that open a data set at once must not remove each other's arrays."""
    folder, cache = write_own(tmp_path / "set"), MetadataCache(tmp_path / "cache")
    H5DatasetReader(folder, metadata_cache=cache)
    (named,) = (path for path in cache.folder.iterdir() if path.is_dir())
    unnamed, unnamed_young, foreign = (named.with_name(f"{'0' * 32}-{end}") for end in ("0" * 8, "1" * 8, "mine"))
    for other in (unnamed, unnamed_young, foreign):
        other.mkdir()
    for old in (named, unnamed, foreign):
        os.utime(old, (0, 0))
    other = H5DatasetReader(write_own(tmp_path / "other"), metadata_cache=cache)
    assert (named.exists(), unnamed.exists(), unnamed_young.exists(), foreign.exists()) == (True, False, True, True)
    own = Path(other.flat["state"].filename).parent
    for old in (named, own):
        os.utime(old, (0, 0))
    hdf5.episode_path(folder, 1).unlink()
    H5DatasetReader(folder, metadata_cache=cache)
    assert (named.exists(), own.exists()) == (False, True)


def test_an_entry_that_cannot_be_written_leaves_no_arrays(tmp_path, large, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metadata_cache, "save_file", full)
    H5DatasetReader(write_own(tmp_path / "set"), metadata_cache=MetadataCache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_folder_that_cannot_be_written(tmp_path, large, caplog):
    folder = write_own(tmp_path / "set")
    (tmp_path / "cache").write_text("a file where a folder should be")
    source = H5DatasetReader(folder, metadata_cache=MetadataCache(tmp_path / "cache"))
    np.testing.assert_array_equal(source.flat["state"], expected(folder, "state"))
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("at", ["append", "keep", "result"])
def test_a_full_disk_is_named(tmp_path, at):
    rows = FlatRows("state", tmp_path, memory_bytes=0)
    block = np.zeros((3, 2), np.float32)
    calls = {"append": lambda: rows.append(block, "c"), "keep": lambda: rows.keep([1]), "result": rows.result}
    for name in ("a", "b"):
        rows.append(block, name)
    rows._file.close()
    rows._file = open("/dev/full", "w+b", buffering=-1 if at == "result" else 0)  # noqa: SIM115
    if at == "result":
        rows._file.write(b"not on disk yet")
    with pytest.raises(OSError, match=rf"{tmp_path}: .* \(state\): No space left .* XDG_CACHE_HOME and TMPDIR"):
        calls[at]()


def test_no_folder_for_the_numbers_at_all(tmp_path, large, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"a copy of the data set's numbers \(state\): No space left"):
        H5DatasetReader(write_own(tmp_path))


@pytest.mark.parametrize("other", [np.zeros((2, 3), np.float64), np.zeros((2, 6), np.float32)])
def test_rows_of_another_kind_are_refused(other):
    rows = FlatRows("state")
    rows.append(np.zeros((4, 3), np.float32), "first.hdf5")
    rows.append(other, "second.hdf5")
    with pytest.raises(
        ValueError, match=r"second\.hdf5: state has rows of float.*, expected float32 \(3,\) as in first"
    ):
        rows.result()


def test_no_file_of_the_user_stays_open_or_mapped(tmp_path, large):
    folder = write_own(tmp_path / "set")
    source = H5DatasetReader(folder)
    store = windows.open_store(source, memory_bytes=0)
    assert not store.in_memory
    rows = np.arange(NUM_ROWS)
    state, frames = store.take("state", rows), store.take("images/top", rows)
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert not any(str(folder) in os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(frames, expected_frames(folder))
    for path in folder.glob("*.hdf5"):
        os.truncate(path, 100)
    np.testing.assert_array_equal(store.take("state", rows), state)  # a copy of ours
    reader = windows.WindowReader(source, cache_bytes=0)
    with pytest.raises(ValueError, match=r"episode_000002\.hdf5: observations/images/top: .* shorter than it was"):
        reader.read("images/top", np.array([10]))


def expected_frames(folder):
    return np.concatenate([hdf5.read_episode(path).images["top"] for path in sorted(folder.glob("*.hdf5"))])


def test_a_copy_in_another_process_has_no_numbers(tmp_path):
    source = copy.deepcopy(H5DatasetReader(write_own(tmp_path)))  # as pickle would
    assert set(source.flat) == NUMBERS
    for ask in (lambda: source.window(2, "state", 0, 9), lambda: source.flat["state"], lambda: source.episode(2)):
        with pytest.raises(ValueError, match=r"^state: a data set sent to another process keeps no numbers"):
            ask()
    np.testing.assert_array_equal(source.window(2, "images/top", 0, 9), expected_frames(tmp_path)[9:18])


def test_the_form_of_a_file_is_checked(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    flat.write(tmp_path / "a.npy", rows)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows)
    np.testing.assert_array_equal(flat.open_mapped(tmp_path / "a.npy", (4, 3), np.dtype(np.float32)), rows)
    for shape, dtype in (((3, 4), np.float32), ((4, 3), np.int32), ((4, 4), np.float32)):
        with pytest.raises(ValueError, match=r"a\.npy: expected"):
            flat.open_mapped(tmp_path / "a.npy", shape, np.dtype(dtype))
