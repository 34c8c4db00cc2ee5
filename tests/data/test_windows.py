"""Rows read when they are asked for are those of a store in memory, whatever the cache and the processes."""

import dataclasses
import os
import threading

import jax
import numpy as np
import pytest

from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.store.flat import FlatRows
from acrlpd.data.store.windows import SourceRows, WindowReader, open_store
from acrlpd.data.view.transforms import Compose
from acrlpd.types import Episode

LENGTHS = [7, 2, 9, 1, 5]
FRAME = 5 * 6 * 3


def make_episode(length, seed) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        state=rng.normal(size=(length, 3)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=rng.normal(size=length).astype(np.float32),
        terminals=np.arange(length) == length - 1,
        task=f"task {seed % 2}",
        images={name: rng.integers(0, 256, (length, 5, 6, 3), np.uint8) for name in ("top", "wrist")},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number, length in enumerate(LENGTHS):
        compression = "gzip" if number % 2 else None  # read through HDF5, and without it
        hdf5.write_episode(hdf5.episode_path(folder, number), make_episode(length, number), compression=compression)
    return H5DatasetReader(folder)


@pytest.fixture(scope="module")
def memory(source):
    return EpisodeStore.from_source(source)


class Windows:
    """A source that can do nothing but read windows."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        if name == "flat" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)


NUMBERS_BYTES = sum(LENGTHS) * (3 + 2 + 1) * 4 + sum(LENGTHS)


def loader(store, **changes):
    arguments = {"batch_size": 16, "horizon": 3, "sequence_ratio": 0.5, "seed": 3} | changes
    return ChunkLoader(store, Compose(()), **arguments)


@pytest.mark.parametrize(
    ("memory_bytes", "windowed"),
    [
        (None, []),
        (NUMBERS_BYTES + sum(LENGTHS) * 2 * FRAME, []),
        (NUMBERS_BYTES + 12 * FRAME, ["images/top", "images/wrist"]),
        (0, ["images/top", "images/wrist"]),
    ],
)
def test_batches_do_not_depend_on_what_is_in_memory(source, memory, memory_bytes, windowed):
    store = open_store(Windows(source), memory_bytes=memory_bytes)
    columns = {key: column.rows for key, column in store._columns.items()}
    assert [key for key, rows in columns.items() if not isinstance(rows, np.ndarray)] == windowed
    expected, found = loader(memory), loader(store)
    for step in range(5):
        jax.tree.map(np.testing.assert_array_equal, found.batch(step), expected.batch(step))
    assert ("cache_hit_rate" in found.stats()) == bool(windowed)


def test_batches_do_not_depend_on_what_is_mapped(source, memory, monkeypatch):
    monkeypatch.setattr(FlatRows.__init__, "__kwdefaults__", {"memory_bytes": 0})
    store = open_store(Windows(source))  # pictures in memory
    assert not store.in_memory
    assert store.reader is None
    for step in range(5):
        jax.tree.map(np.testing.assert_array_equal, loader(store).batch(step), loader(memory).batch(step))


@pytest.mark.parametrize("key", ["state", "actions", "rewards"])
def test_numbers_of_a_source_of_windows_are_finite(source, key):
    class Broken(Windows):
        def window(self, index, name, start, stop):
            rows = self._source.window(index, name, start, stop).copy()
            if name == key and index == 1:
                rows[0] = np.nan
            return rows

    with pytest.raises(ValueError, match=rf"episode_000001\.hdf5: {key} holds a number that is not finite"):
        open_store(Broken(source), memory_bytes=0)


def test_without_cameras_nothing_is_read_on_demand(tmp_path):
    episode = dataclasses.replace(make_episode(4, 0), images={})
    hdf5.write_episode(hdf5.episode_path(tmp_path, 0), episode)
    store = open_store(H5DatasetReader(tmp_path), memory_bytes=0)  # the numbers alone are larger
    assert (store.reader, store.in_memory) == (None, True)


def test_a_store_of_windows_is_a_source_itself(source, memory):
    store = open_store(Windows(source), memory_bytes=0)
    assert (store.num_rows, store.lengths.tolist(), store.tasks) == (sum(LENGTHS), LENGTHS, memory.tasks)
    for index in range(len(LENGTHS)):
        found, expected = store.episode(index), memory.episode(index)
        np.testing.assert_array_equal(found.state, expected.state)
        np.testing.assert_array_equal(found.images["wrist"], expected.images["wrist"])
        assert (found.task, found.source) == (expected.task, expected.source)
    with pytest.raises(ValueError, match="cannot grow"):
        store.append(memory.episode(0))


def test_rows_come_in_the_order_asked_for(source, memory):
    reader = WindowReader(source, cache_bytes=0)
    rows = np.array([23, 0, 8, 8, 3, 0, 17, 9])
    np.testing.assert_array_equal(reader.read("images/top", rows), memory.images["top"][rows])
    assert reader.hit_rate == 0.0
    assert reader.read("images/top", np.zeros(0, int)).shape == (0, 5, 6, 3)
    grid = SourceRows(reader, "images/top", (sum(LENGTHS), 5, 6, 3))
    np.testing.assert_array_equal(grid[rows.reshape(2, 4)], memory.images["top"][rows.reshape(2, 4)])
    np.testing.assert_array_equal(grid[2:5], memory.images["top"][2:5])


class Counted:
    """A source that counts the rows read from it."""

    def __init__(self, source):
        self._source = source
        self.rows = 0

    def __getattr__(self, name):
        return getattr(self._source, name)

    def window(self, index, key, start, stop):
        self.rows += stop - start
        return self._source.window(index, key, start, stop)


def test_a_row_is_read_once_while_its_episode_is_held(source):
    counted = Counted(source)
    reader = WindowReader(counted, cache_bytes=5 * FRAME)
    reader.read("images/top", np.array([0, 3, 3]))  # episode 0
    assert (counted.rows, reader.hit_rate) == (2, 0.0)
    reader.read("images/top", np.array([3, 0, 4]))  # two of three are there
    assert (counted.rows, reader.hit_rate) == (3, 2 / 6)
    reader.read("images/top", np.array([9, 10]))  # episode 2: that makes five
    reader.read("images/top", np.array([0, 9]))
    assert counted.rows == 5
    reader.read("images/top", np.array([7]))  # a sixth, for which episode 0 goes, used before episode 2
    reader.read("images/top", np.array([9]))
    assert counted.rows == 6
    reader.read("images/top", np.array([0]))
    assert counted.rows == 7


def test_more_than_the_limit_is_not_held(source, memory):
    counted = Counted(source)
    reader = WindowReader(counted, cache_bytes=FRAME)
    for _ in range(2):
        rows = np.array([16, 9, 16])
        np.testing.assert_array_equal(reader.read("images/top", rows), memory.images["top"][rows])
    assert counted.rows == 4
    assert reader.hit_rate == 0.0


def test_threads_take_turns(source, memory):
    reader = WindowReader(source, cache_bytes=10 * FRAME)
    failures = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.integers(sum(LENGTHS), size=6)
            if not np.array_equal(reader.read("images/top", rows), memory.images["top"][rows]):
                failures.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.slow
def test_processes_change_nothing(source, memory):
    store = open_store(source, memory_bytes=NUMBERS_BYTES + 12 * FRAME, num_workers=2)
    expected, found = loader(memory), loader(store)
    try:
        for step in range(4):
            jax.tree.map(np.testing.assert_array_equal, found.batch(step), expected.batch(step))
    finally:
        found.close()


@pytest.mark.slow
def test_an_error_in_a_process_names_the_file(tmp_path):
    for number in range(2):
        hdf5.write_episode(hdf5.episode_path(tmp_path, number), make_episode(4, number))
    store = open_store(Windows(H5DatasetReader(tmp_path)), memory_bytes=400, num_workers=1)
    os.truncate(hdf5.episode_path(tmp_path, 1), 100)
    try:
        with pytest.raises(ValueError, match=r"episode_000001\.hdf5: observations/images/top: rows 0\.\.1"):
            store.images["top"][np.array([4])]
        np.testing.assert_array_equal(store.images["top"][np.array([1])][0], make_episode(4, 0).images["top"][1])
    finally:
        loader(store).close()


def test_limits_are_checked(source):
    with pytest.raises(ValueError, match=r"num_workers \(-1\)"):
        WindowReader(source, cache_bytes=0, num_workers=-1)
