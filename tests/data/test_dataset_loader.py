"""Loaders by the names of the founding design: from a path to batches on all devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import acrlpd
from acrlpd.data import chunks
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.founding.loaders import ACRLPDDataLoader, LeRobotACRLPDDataLoader, create_lerobot_acrlpd_dataloader
from acrlpd.types import Episode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for number in range(3):
        episode = Episode(
            state=rng.normal(size=(9, 3)).astype(np.float32),
            actions=rng.normal(size=(9, 2)).astype(np.float32),
            rewards=np.zeros(9, np.float32),
            terminals=np.arange(9) == 8,
            task="lift",
            images={"top": rng.integers(0, 256, (9, 4, 4, 3), np.uint8)},
        )
        hdf5.write_episode(hdf5.episode_path(folder, number), episode)
    return folder


@pytest.fixture(scope="module")
def videos(shared):
    found = [path.parent.parent for path in sorted((shared / "data").rglob("meta/info.json"))]
    found = [path for path in found if "video" in path.name]
    if not found:
        pytest.skip("this root has no LeRobot videos")
    return found[0]


@pytest.fixture(scope="module")
def lerobot_folder(shared):
    found = [path.parent.parent for path in sorted((shared / "data").rglob("meta/info.json"))]
    found = [path for path in found if "image" in path.name]
    if not found:
        pytest.skip("this root has no LeRobot pictures")
    return found[0]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_lie_on_all_devices(folder):
    loader = ACRLPDDataLoader(folder, 8, 3, seed=2)
    in_memory = ACRLPDDataLoader(H5DatasetReader(folder), 8, 3, device_placement="none", seed=2)
    assert isinstance(loader, ChunkLoader)
    for _ in range(2):
        placed, plain = loader.sample_batch(), in_memory.sample_batch()
        assert_same(placed, plain)
        assert isinstance(plain.actions, np.ndarray)
        for leaf in jax.tree.leaves(placed):
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {8 // jax.device_count()}
            assert len(leaf.addressable_shards) == jax.device_count() > 1
    assert placed.observations.images["top"].dtype == np.uint8
    loader.next_step = 1
    assert_same(loader.sample_batch(), placed)
    for each in (loader, in_memory):
        each.close()


def test_what_cannot_be_is_said(folder):
    with pytest.raises(ValueError, match=r"batch_size \(7\) must be a multiple of the 2 devices"):
        ACRLPDDataLoader(folder, 7, 3)
    with pytest.raises(ValueError, match="device_placement must be 'auto' or 'none', got 'gpu'"):
        ACRLPDDataLoader(folder, 8, 3, device_placement="gpu")
    with pytest.raises(ValueError, match="expected a LeRobot dataset, found hdf5 data: use ACRLPDDataLoader"):
        LeRobotACRLPDDataLoader(folder, 8, 3)
    with pytest.raises(ValueError, match="give cameras to the source itself"):
        ACRLPDDataLoader(H5DatasetReader(folder), 8, 3, cameras=())


def test_signatures_of_the_founding_design(folder):
    keywords = {"batch_size": 8, "horizon_length": 3, "sequence_ratio": 1.0, "device_placement": "none"}
    for loader in (ACRLPDDataLoader(str(folder), 8, 3, 1, "none"), ACRLPDDataLoader(data_dir=str(folder), **keywords)):
        batch = loader.sample_batch()
        loader.close()
        assert batch.actions.shape == (8, 3, 2)
        assert (batch.step_id <= 6).all()  # every window of 3 fits into its episode


@pytest.mark.parametrize("by_name", [False, True])
def test_the_reader_of_the_founding_design(folder, by_name):
    told = {"fps": 12.5, "task": "push"}
    reader = H5DatasetReader(data_dir=str(folder), episode_metadata=told) if by_name else H5DatasetReader(folder, told)
    assert (reader.num_episodes, reader.fps, reader.info(0).task) == (3, 12.5, "lift")  # the file's own word goes first
    with pytest.raises(ValueError, match="episode_metadata has robot: expected fps, task or both"):
        H5DatasetReader(folder, {"robot": "aloha"})


@pytest.mark.reference
def test_lerobot_signatures_of_the_founding_design(lerobot_folder):
    loaders = [
        LeRobotACRLPDDataLoader(lerobot_folder, 4),
        LeRobotACRLPDDataLoader(lerobot_dataset=lerobot_folder, batch_size=4),
        create_lerobot_acrlpd_dataloader(lerobot_folder, 4, 3),
        create_lerobot_acrlpd_dataloader(lerobot_dataset=lerobot_folder, batch_size=4, horizon_length=3),
    ]
    for loader, horizon in zip(loaders, (50, 50, 3, 3), strict=True):
        batch = loader.batch(0)
        loader.close()
        assert isinstance(loader, ACRLPDDataLoader)
        assert batch.actions.shape[:2] == (4, horizon)


@pytest.mark.reference
def test_a_lerobot_dataset_makes_batches(videos):
    rewards = RewardConfig(source="sparse")
    source = LeRobotSource(videos, episodes=[1, 0], rewards=rewards)
    loader = create_lerobot_acrlpd_dataloader(videos, 6, 4, episodes=[1, 0], rewards=rewards, seed=5)
    assert isinstance(loader, LeRobotACRLPDDataLoader)
    batch = loader.batch(2)
    loader.close()
    store = EpisodeStore.from_source(source)
    expected = chunks.gather(store, chunks.start_rows(store, chunks.step_rng(5, 2), 6, 4, 0.5), 4)
    np.testing.assert_array_equal(batch.actions, expected["actions"])
    np.testing.assert_array_equal(batch.rewards, expected["rewards"])
    for camera in source.cameras:
        np.testing.assert_array_equal(batch.observations.images[camera], expected["image"][camera])
    windowed = LeRobotACRLPDDataLoader(source, 6, 4, memory_bytes=1 << 20, seed=5)
    assert windowed.stats().keys() - loader.stats().keys() == {"cache_hit_rate"}
    assert_same(windowed.batch(2), batch)
    windowed.close()


@pytest.mark.reference
def test_frames_of_videos_are_read_from_the_cache(videos, tmp_path, monkeypatch):
    cache = FrameCache(tmp_path, 24, 32)
    source = LeRobotSource(videos, episodes=[1, 0], frame_cache=cache)
    decoded = ACRLPDDataLoader(source, 6, 4, seed=5)
    cache.build(source)
    loader = ACRLPDDataLoader(source, 6, 4, memory_bytes=1 << 16, seed=5)
    monkeypatch.setattr(source._files, "frames", None)  # no video is asked any more
    assert_same(loader.batch(2), decoded.batch(2))
    for each in (loader, decoded):
        each.close()


HOST = """
import sys
import jax
import numpy as np
from acrlpd.founding.loaders import ACRLPDDataLoader

folder, address, index, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
batch = ACRLPDDataLoader(folder, 8, 3, seed=2).sample_batch()
assert batch.actions.shape == (8, 3, 2) and jax.device_count() == 4 and not batch.actions.is_fully_addressable
rows = {shard.index[0].start: np.asarray(shard.data) for shard in batch.actions.addressable_shards}
total = jax.jit(lambda batch: batch.actions.sum())(batch)  # over all processes
np.savez(out, total=np.asarray(total), **{str(start): data for start, data in rows.items()})
"""


@pytest.mark.slow
def test_two_processes_hold_one_batch(folder, tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    address = f"localhost:{20_000 + os.getpid() % 20_000}"
    source = Path(acrlpd.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    outs = [tmp_path / f"{index}.npz" for index in range(2)]
    hosts = [
        subprocess.Popen([sys.executable, str(script), str(folder), address, str(index), str(out)], env=env)
        for index, out in enumerate(outs)
    ]
    assert [host.wait(timeout=120) for host in hosts] == [0, 0]
    found = {}
    for out in outs:
        with np.load(out) as arrays:
            found |= {int(name): arrays[name] for name in arrays.files if name != "total"}
            total = arrays["total"]
    assert sorted(found) == [0, 2, 4, 6]
    loader = ACRLPDDataLoader(folder, 8, 3, device_placement="none", seed=2)
    whole = loader.sample_batch().actions
    loader.close()
    np.testing.assert_array_equal(np.concatenate([found[start] for start in sorted(found)]), whole)
    np.testing.assert_allclose(total, whole.sum(), rtol=1e-5)
