"""A second opening must be quick, and may never tell what is no longer so."""

import logging
import os
import subprocess
import time
import warnings

import numpy as np
import pytest
from safetensors import SafetensorError

from acrlpd import files
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.types import Episode


def write(folder, number, length=4, value=0.0):
    episode = Episode(
        state=np.full((length, 2), value, np.float32),
        actions=np.full((length, 1), value, np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        task="lift",
    )
    return hdf5.write_episode(hdf5.episode_path(folder, number), episode)


class Counting:
    """Finds out the length of a file, and counts how often."""

    def __init__(self, path):
        self.path = path
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"size": np.array(self.path.stat().st_size)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data/a.bin"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    return path


@pytest.fixture
def cache(tmp_path):
    return MetadataCache(tmp_path / "cache")


def test_it_is_found_out_once(cache, file):
    find_out = Counting(file)
    for _ in range(3):
        assert cache.get(file.parent, "options", find_out)["size"] == 5
    assert find_out.calls == 1
    cache.get(file.parent, "other options", find_out)
    assert find_out.calls == 2


@pytest.mark.parametrize("change", ["size", "time", "name", "new", "gone", "below", "swapped", "rewritten", "folders"])
def test_any_change_of_the_files_is_noticed(cache, file, change):
    other = file.with_name("b.bin")
    other.write_bytes(b"x")
    for number in range(2):
        (file.parent / f"episode_{number}").mkdir()
        (file.parent / f"episode_{number}/d.bin").write_bytes(b"%d" % number)
    for path in file.parent.rglob("*.bin"):
        os.utime(path, (0, 0))
    find_out = Counting(file)
    cache.get(file.parent, "", find_out)
    if change == "size":
        file.write_bytes(b"123456")
    elif change == "time":
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "name":
        other.rename(file.with_name("c.bin"))
    elif change == "swapped":
        file.with_name("c.bin").write_bytes(b"54321")
        os.utime(file.with_name("c.bin"), (0, 0))
        os.replace(file.with_name("c.bin"), file)
    elif change == "rewritten":
        file.write_bytes(b"54321")
        os.utime(file, (0, 0))
    elif change == "folders":
        for old, new in (("episode_0", "x"), ("episode_1", "episode_0"), ("x", "episode_1")):
            (file.parent / old).rename(file.parent / new)
    elif change == "new":
        file.with_name("c.bin").write_bytes(b"")
    elif change == "gone":
        other.unlink()
    else:
        (file.parent / "folder").mkdir()
        (file.parent / "folder/c.bin").write_bytes(b"")
    assert cache.get(file.parent, "", find_out)["size"] == file.stat().st_size
    assert find_out.calls == 2


@pytest.mark.parametrize("content", [b"", b"not an entry", "cut", "flipped", "other version"])
def test_a_damaged_entry_is_made_anew(cache, file, content, monkeypatch):
    find_out = Counting(file)
    cache.get(file.parent, "", find_out)
    entry = cache.entry_path(file.parent, "")
    whole = entry.read_bytes()
    if content == "other version":
        monkeypatch.setattr("acrlpd.data.store.metadata_cache.VERSION", 999)
    elif content == "cut":
        entry.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        middle = whole.index(b"\x05\x00\x00\x00\x00\x00\x00\x00", 100)  # the number itself
        entry.write_bytes(whole[:middle] + b"\x06" + whole[middle + 1 :])
    else:
        entry.write_bytes(content)
    for _ in range(2):
        assert cache.get(file.parent, "", find_out)["size"] == 5
    assert find_out.calls == 2


def test_no_damaged_byte_goes_unnoticed(tmp_path, file):
    """Of the names, shapes and texts of an entry, and of its numbers."""
    arrays = {"size": np.array(5), "rewards": np.arange(6, dtype=np.float32).reshape(2, 3)}
    cache, found_anew = MetadataCache(tmp_path / "cache"), []

    def find_out():
        found_anew.append(True)
        warnings.warn("told", stacklevel=1)
        return arrays

    def opened():
        with pytest.warns(UserWarning, match="^told$"):
            found = cache.get(file.parent, "", find_out)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)

    opened()
    entry = cache.entry_path(file.parent, "")
    whole = entry.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ rng.integers(1, 256)]) + whole[place + 1 :])
        opened()
    assert len(found_anew) > len(whole) / 2  # all but what pads the header, where nothing is said


def test_no_room_for_an_entry_is_no_error(tmp_path, file, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        assert MetadataCache(tmp_path / "cache").get(file.parent, "", Counting(file))["size"] == 5
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("dtype", ["u1", "i1", "i4", "i8", "f4", "f8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 2)])
def test_arrays_stay_in_the_entry_as_they_were(cache, file, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for _ in range(2):
        found = cache.get(file.parent, "", lambda: {"odd": np.zeros(3, np.uint8), "array": array})["array"]
        assert (found.dtype, found.shape) == (array.dtype, shape)
        np.testing.assert_array_equal(found, array)
        assert not found.flags.owndata
        assert not found.flags.writeable
        assert found.flags.aligned


def test_a_full_disk_is_no_error(cache, file, caplog, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("acrlpd.data.store.metadata_cache.save_file", fail)
    with caplog.at_level(logging.WARNING):
        assert cache.get(file.parent, "", Counting(file))["size"] == 5
    assert "No space left" in caplog.text


def test_what_a_killed_process_left_is_removed(cache, file):
    process = subprocess.Popen(["true"])
    process.wait()
    entry = cache.entry_path(file.parent, "")
    entry.parent.mkdir(parents=True, exist_ok=True)
    ours = files.temporary_path(entry).name
    entry.with_name(ours.replace(f"-{os.getpid()}.", f"-{process.pid}.")).write_bytes(b"half")
    cache.get(file.parent, "", Counting(file))
    assert list(entry.parent.iterdir()) == [entry]


def test_a_failure_is_not_remembered(cache, file):
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.get(file.parent, "", fail)
    assert cache.get(file.parent, "", Counting(file))["size"] == 5


def test_its_place_is_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert MetadataCache().folder == tmp_path / "acrlpd/metadata"


def test_a_changed_episode_is_read_anew(tmp_path, cache):
    folder = tmp_path / "set"
    for number in range(3):
        write(folder, number)
    assert H5DatasetReader(folder, metadata_cache=cache).lengths.tolist() == [4, 4, 4]
    write(folder, 1, length=6, value=2.0)
    changed = H5DatasetReader(folder, metadata_cache=cache)
    assert changed.lengths.tolist() == [4, 6, 4]
    assert changed.episode(1).state[0, 0] == 2.0
    bad = hdf5.episode_path(folder, 2)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"episode_000002\.hdf5"):
        H5DatasetReader(folder, metadata_cache=cache)


@pytest.mark.slow
def test_thousands_of_episodes_open_at_once(tmp_path, cache):
    folder = tmp_path / "set"
    first = write(folder, 0)
    num_episodes = 3000
    for number in range(1, num_episodes):
        os.link(first, hdf5.episode_path(folder, number))
    assert H5DatasetReader(folder, metadata_cache=cache).num_episodes == num_episodes
    started = time.process_time()
    assert H5DatasetReader(folder, metadata_cache=cache).num_episodes == num_episodes
    assert time.process_time() - started < 0.5
