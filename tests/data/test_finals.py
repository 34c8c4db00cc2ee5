"""What was seen after the last action reaches the TD loss from every format that has it, wherever the rows lie."""

import dataclasses

import h5py
import numpy as np
import pytest

from acrlpd.data import chunks
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.npz import NpzReader
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.replay import ReplayJournal
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.store.finals import FinalSource
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.data.store.windows import SourceRows, open_store
from acrlpd.data.tools import convert
from acrlpd.data.view.transforms import Compose
from acrlpd.types import Episode, FinalObservation

LENGTHS = (6, 3, 1, 4)
HAS_FINAL = [True, False, True, True]


def count(first, length):
    """States and pictures of a counter, one more than there are steps."""
    numbers = np.arange(first, first + length + 1)
    frames = np.broadcast_to(numbers[:, None, None, None], (length + 1, 5, 6, 3)).astype(np.uint8)
    return numbers[:, None].astype(np.float32), frames


def counting_episode(number) -> Episode:
    length = LENGTHS[number]
    states, frames = count(10 * number, length)
    return Episode(
        state=states[:-1],
        actions=np.zeros((length, 2), np.float32),
        rewards=-np.ones(length, np.float32),
        terminals=np.zeros(length, bool),
        task="count",
        images={"top": frames[:-1], "wrist": 100 + frames[:-1]},
        final=FinalObservation(states[-1], {"top": frames[-1], "wrist": 100 + frames[-1]})
        if HAS_FINAL[number]
        else None,
    )


def write(folder, **options):
    for number in range(len(LENGTHS)):
        hdf5.write_episode(hdf5.episode_path(folder, number), counting_episode(number), **options)
    return folder


def assert_follows(store, horizons=(1, 2, 3, 6), cameras=True):
    """Every chunk that bootstraps does so from the state ``horizon`` steps later; those at known ends do."""
    for horizon in horizons:
        chunk = chunks.gather(store, np.arange(store.num_rows), 6, backup_horizon=horizon, images=cameras)
        used = chunk["sequence_mask"] == 1
        np.testing.assert_array_equal(chunk["next_state"][used], chunk["state"][used] + horizon)
        for camera, frames in chunk["next_image"].items():
            np.testing.assert_array_equal(frames[used], chunk["image"][camera][used] + horizon)
        ends = chunk["step_id"] + horizon - store.lengths[chunk["episode_id"]]
        np.testing.assert_array_equal(used, (ends < 0) | ((ends == 0) & store.has_final[chunk["episode_id"]]))


def gzipped(folder):
    return H5DatasetReader(write(folder, compression="gzip"))


def remembered(folder):
    write(folder)
    cache = MetadataCache(folder / "cache")
    H5DatasetReader(folder, metadata_cache=cache)
    return H5DatasetReader(folder, metadata_cache=cache)


def journalled(folder):
    journal = ReplayJournal(folder)
    for number in range(len(LENGTHS)):
        journal.append(counting_episode(number))
    return EpisodeStore.from_episodes(ReplayJournal(folder).load())


def converted(folder):
    return H5DatasetReader(convert.to_hdf5(H5DatasetReader(write(folder / "a")), folder / "b"))


SOURCES = {
    "files": lambda folder: H5DatasetReader(write(folder)),
    "compressed": gzipped,
    "opened again": remembered,
    "journal": journalled,
    "converted": converted,
    "one camera": lambda folder: H5DatasetReader(write(folder), cameras=["wrist"]),
    "a frame cache": lambda folder: H5DatasetReader(write(folder), frame_cache=FrameCache(folder / "frames", 5, 6)),
}


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("name", SOURCES)
def test_it_is_kept_on_every_way(tmp_path, name, memory_bytes):
    source = SOURCES[name](tmp_path)
    assert isinstance(source, FinalSource)
    assert source.has_final.tolist() == HAS_FINAL
    assert_follows(open_store(source, memory_bytes=memory_bytes))


def test_it_is_read_when_it_is_asked_for(tmp_path):
    class Windows:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            if name == "flat" or name.startswith("_"):
                raise AttributeError(name)
            return getattr(self._source, name)

    store = open_store(Windows(gzipped(tmp_path)), memory_bytes=0)
    assert isinstance(store._columns["images/top"].rows, SourceRows)
    assert_follows(store)
    assert store.episode(3).final.images["wrist"].tolist() == np.full((5, 6, 3), 134).tolist()


def test_pictures_of_the_frame_caches_size(tmp_path):
    source = H5DatasetReader(write(tmp_path), frame_cache=FrameCache(tmp_path / "frames", 4, 4))
    assert source.episode(0).final.images["top"].shape == (4, 4, 3)
    assert open_store(source, memory_bytes=0).take_finals("images/top", np.array([0, 3])).shape == (2, 4, 4, 3)


def test_episodes_that_were_cut_without_it_are_counted():
    ended = np.array([False, False, True])
    short = dataclasses.replace(counting_episode(1), final=None)
    store = EpisodeStore.from_episodes([counting_episode(0), short, dataclasses.replace(short, terminals=ended), short])
    assert chunks.num_cut(store) == 2


def test_files_of_before_are_read(tmp_path):
    write(tmp_path)
    for path in tmp_path.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            if "final" in file:
                del file["final"]
    reader = H5DatasetReader(tmp_path)
    assert not reader.has_final.any()
    assert hdf5.read_episode(hdf5.episode_path(tmp_path, 0)).final is None
    assert_follows(EpisodeStore.from_source(reader))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("final/state", np.zeros((2, 1), np.float32), "final/state: expected 1 row"),
        ("final/state", np.zeros((1, 3), np.float32), "final.state: expected"),
        ("final/state", np.float32([[np.inf]]), "final.state: expected finite"),
        ("final/images/top", np.zeros((1, 5, 7, 3), np.uint8), "final.images/top: expected"),
        ("final/images/top", None, "final/images/top: expected a dataset, found nothing"),
    ],
)
@pytest.mark.parametrize("read", [H5DatasetReader, lambda folder: hdf5.read_episode(hdf5.episode_path(folder, 0))])
def test_a_broken_one_is_named(tmp_path, key, value, message, read):
    path = hdf5.episode_path(write(tmp_path), 0)
    with h5py.File(path, "r+") as file:
        del file[key]
        if value is not None:
            file[key] = value
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("with_next", [True, False])
def test_robomimic_has_it_in_next_obs(tmp_path, with_next):
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for number, length in enumerate(LENGTHS):
            states, frames = count(10 * number, length)
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"], demo["rewards"] = np.zeros((length, 2)), np.zeros(length)
            for group, part in {"obs": slice(0, length), "next_obs": slice(1, length + 1)}.items():
                if group == "obs" or with_next:
                    demo[f"{group}/count"], demo[f"{group}/top_image"] = states[part, 0], frames[part]
    for memory_bytes in (None, 0):
        store = open_store(H5DatasetReader(tmp_path, state_keys=["count"]), memory_bytes=memory_bytes)
        assert store.has_final.tolist() == [with_next] * 4
        assert_follows(store)


def test_a_next_obs_of_another_length_is_named(tmp_path):
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["obs/x"], demo["next_obs/x"] = np.zeros((4, 2)), np.zeros(4), np.zeros(3)
    with pytest.raises(ValueError, match="next_obs/x: expected 4 rows"):
        H5DatasetReader(tmp_path, state_keys=["x"])


def test_aligned_libero_has_it_in_the_last_row(tmp_path):
    """LIBERO's row t is what was seen after its action: the last one is what follows the last action."""
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        states, frames = count(0, 5)
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["rewards"] = np.zeros((6, 2)), np.zeros(6)
        demo["obs/count"], demo["obs/agentview_rgb"] = states[:, 0], frames
    source = H5DatasetReader(tmp_path, state_keys=["count"], align_observations=True)
    assert (source.lengths.tolist(), source.has_final.tolist()) == ([5], [True])
    assert_follows(EpisodeStore.from_source(source))


def test_ogbench_has_it_in_the_row_that_ends_a_trajectory(tmp_path):
    numbers = np.concatenate([count(10 * number, length)[0] for number, length in enumerate(LENGTHS)])
    ends = np.isin(np.arange(len(numbers)), np.cumsum([length + 1 for length in LENGTHS]) - 1)
    np.savez(tmp_path / "play.npz", observations=numbers, actions=np.zeros((len(numbers), 2)), terminals=ends)
    store = open_store(NpzReader(tmp_path / "play.npz"))
    assert store.has_final.all()
    assert_follows(store)


def test_critics_alone_leave_out_what_no_action_follows():
    """At the final observation the data takes no action; the chunk before it is followed by real ones."""
    known = dataclasses.replace(counting_episode(0), images={})
    unknown = dataclasses.replace(known, final=None)
    for episode, last_used in ((known, 2), (unknown, 2)):
        loader = ChunkLoader(
            EpisodeStore.from_episodes([episode]),
            Compose(()),
            batch_size=64,
            horizon=2,
            sequence_ratio=0.0,
            seed=0,
            prefetch=0,
        )
        batch = loader.batch(0, critic_alone=True)
        np.testing.assert_array_equal(batch.sequence_mask, batch.step_id <= last_used)
