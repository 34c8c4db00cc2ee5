"""The founding design's names for batches from a LeRobot dataset, on the same machinery as every other loader."""

import types

import jax
import numpy as np
import pytest

from acrlpd.data import chunks
from acrlpd.data.episodes import EpisodeStore
from acrlpd.data.lerobot import LeRobotACRLPDDataLoader, LeRobotSource, create_lerobot_acrlpd_dataloader
from acrlpd.data.loader import ACRLPDDataLoader
from acrlpd.data.rewards import RewardConfig

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def root(shared):
    found = [path.parent.parent for path in sorted((shared / "data").rglob("meta/info.json"))]
    videos = [path for path in found if "video" in path.name]
    if not videos:
        pytest.skip("this root has no LeRobot videos")
    return videos[0]


def test_a_dataset_object_makes_batches(root):
    dataset = types.SimpleNamespace(root=root, episodes=[1, 0])
    loader = create_lerobot_acrlpd_dataloader(dataset, 6, 4, rewards=RewardConfig(source="sparse"), seed=5)
    assert isinstance(loader, LeRobotACRLPDDataLoader)
    assert isinstance(loader, ACRLPDDataLoader)
    batch = loader.batch(2)
    source = LeRobotSource(root, episodes=[1, 0], rewards=RewardConfig(source="sparse"))
    store = EpisodeStore.from_source(source)
    rows = chunks.start_rows(store, chunks.step_rng(5, 2), 6, 4, 0.5)
    expected = chunks.gather(store, rows, 4)
    np.testing.assert_array_equal(batch.actions, expected["actions"])
    np.testing.assert_array_equal(batch.rewards, expected["rewards"])
    for camera in source.cameras:
        np.testing.assert_array_equal(batch.observations.images[camera], expected["image"][camera])


def test_memory_changes_nothing(root):
    in_memory = LeRobotACRLPDDataLoader(root, 4, 3)
    windowed = LeRobotACRLPDDataLoader(root, 4, 3, memory_bytes=1 << 20)
    assert windowed.stats().keys() - in_memory.stats().keys() == {"cache_hit_rate"}
    for step in range(2):
        jax.tree.map(np.testing.assert_array_equal, windowed.batch(step), in_memory.batch(step))


def test_options_of_a_source_go_to_the_source(root):
    with pytest.raises(ValueError, match="give cameras to the LeRobotSource itself"):
        LeRobotACRLPDDataLoader(LeRobotSource(root), 4, 3, cameras=())
