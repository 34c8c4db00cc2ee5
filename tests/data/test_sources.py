"""One way in for every format, and what it says to anything else."""

import dataclasses
import re
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from acrlpd.data import sources
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.npz import CubeGoal
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.types import Episode


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write(folder, number, length=4, **changes):
    steps = np.arange(length, dtype=np.float32)
    episode = Episode(
        state=np.stack([steps, steps], axis=1),
        actions=steps[:, None],
        rewards=np.zeros(length, np.float32),
        terminals=steps == length - 1,
        task="lift",
        images={"top": np.full((length, 6, 8, 3), number, np.uint8)},
    )
    return hdf5.write_episode(hdf5.episode_path(folder, number), dataclasses.replace(episode, **changes))


def data_sets(shared: Path):
    """(path, steps of each episode) of every reference set."""
    found = []
    for reference in sorted((shared / "data").rglob("*reference.npz")):
        stem = str(reference).removesuffix("reference.npz").removesuffix(".")
        path = next((path for path in (Path(stem), Path(f"{stem}.hdf5")) if path.exists()), None)
        if path is not None:
            with np.load(reference, allow_pickle=False) as values:
                found.append((path, values["episode_lengths"].tolist()))
    return found


@pytest.mark.reference
def test_every_reference_set_opens_and_is_remembered(shared, cache_home):
    found = data_sets(shared)
    assert found
    for path, lengths in found:
        first = sources.open_episodes(path)
        again = sources.open_episodes(path)
        for dataset in (first, again):
            assert dataset.lengths.tolist() == lengths, path
        assert [first.info(index) for index in range(len(lengths))] == [
            again.info(index) for index in range(len(lengths))
        ]
        for key in ("state", "actions", "rewards", "terminals", *(f"images/{camera}" for camera in first.cameras)):
            np.testing.assert_array_equal(
                first.window(0, key, 1, 3), again.window(0, key, 1, 3), err_msg=f"{path} {key}"
            )
    assert len(list(cache_home.rglob("*.safetensors"))) == len(found)


def lerobot_object(root, episodes=None, tolerance_s=1e-4):
    """The attributes that the constructor of lerobot's LeRobotDataset sets (0.3 and 0.4), without torch."""
    meta = types.SimpleNamespace(repo_id="me/set", root=Path(root), revision="v3.0", tasks=None, episodes=None, info={})
    return types.SimpleNamespace(
        repo_id="me/set",
        root=Path(root),
        image_transforms=None,
        delta_timestamps=None,
        episodes=episodes,
        tolerance_s=tolerance_s,
        revision="v3.0",
        video_backend="pyav",
        delta_indices=None,
        meta=meta,
        hf_dataset=None,
    )


@pytest.mark.reference
@pytest.mark.parametrize("chosen", [[2, 0], (2, 0), np.array([2, 0])])
def test_an_object_of_the_lerobot_library_counts_with_its_selection(shared, chosen):
    root = shared / "data/lerobot-v3.0/aloha_image"
    if not root.is_dir():
        pytest.skip("this root has no such set")
    whole = sources.open_episodes(root)
    dataset = sources.open_episodes(lerobot_object(root, episodes=chosen))
    assert dataset.lengths.tolist() == whole.lengths[[2, 0]].tolist()
    np.testing.assert_array_equal(dataset.episode(0).actions, whole.episode(2).actions)
    assert sources.open_episodes(lerobot_object(root)).num_episodes == whole.num_episodes
    with pytest.raises(ValueError, match="timestamp"):
        sources.open_episodes(lerobot_object(root, tolerance_s=-1.0))
    for wrong in ([0, 3], [0, 0], [], np.array([0.5])):
        with pytest.raises(ValueError, match=r"episodes must be different numbers in 0\.\.2"):
            sources.open_episodes(lerobot_object(root, episodes=wrong))


def test_other_objects_are_refused(tmp_path):
    for stranger in (3, types.SimpleNamespace(root=tmp_path), types.SimpleNamespace(meta=None)):
        with pytest.raises(TypeError, match=rf"a LeRobotDataset, got {type(stranger).__name__} without meta\.root"):
            sources.open_episodes(stranger)
    several = types.SimpleNamespace(root=tmp_path, repo_ids=["me/a", "me/b"])
    with pytest.raises(TypeError, match="holds several datasets: open them one by one"):
        sources.open_episodes(several)


@pytest.mark.reference
def test_play_data_takes_a_goal(shared):
    path = next((shared / "data/ogbench").glob("*.npz"), None)
    if path is None:
        pytest.skip("this root has no play data")
    dataset = sources.open_episodes(path, goal=CubeGoal(((0.425, 0.1, 0.02),)), rewards=RewardConfig(source="sparse"))
    assert dataset.format == "ogbench"
    assert dataset.episode(0).rewards.min() == -1
    with pytest.raises(ValueError, match="name the goal"):
        sources.open_episodes(path, rewards=RewardConfig())
    with pytest.raises(ValueError, match=re.escape(path.parent.name) + r".*Name one of .*npz"):
        sources.open_episodes(path.parent)


def test_what_is_no_data_set_is_described(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    (tmp_path / "below/set/meta").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        ValueError, match=r"found 2 \.txt files, 1 folders, 1 \.md files, and no episodes.*LeRobot.*DROID"
    ):
        sources.open_episodes(tmp_path)
    with pytest.raises(ValueError, match=r"readme\.md: found a file of type \.md.*robomimic"):
        sources.open_episodes(tmp_path / "readme.md")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*OGBench"):
        sources.open_episodes(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="copy it first"):
        sources.open_episodes("lerobot/pusht")
    (tmp_path / "below/set/meta/info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds LeRobot datasets. Name one of them, such as .*below/set"):
        sources.open_episodes(tmp_path / "below")


def test_an_option_without_meaning_is_refused(tmp_path):
    write(tmp_path, 0)
    with pytest.raises(ValueError, match=r"goal means nothing to hdf5 data. It has the options .*cameras"):
        sources.open_episodes(tmp_path, goal=None)


def test_skipping_is_told_each_time(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1)
    bad = hdf5.episode_path(tmp_path, 1)
    bad.write_bytes(bad.read_bytes()[:200])
    told = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = sources.open_episodes(tmp_path, on_bad_episode="skip")
        told.append([str(warning.message) for warning in caught])
        assert dataset.num_episodes == 1
        assert [name for name, _ in dataset.skipped] == [str(bad)]
    assert told[0] == told[1]
    assert any("1 of 2 episodes were left out" in text for text in told[0])


def test_frames_of_any_format_come_from_the_cache(tmp_path):
    for number in (7, 9):
        write(tmp_path / "set", number)
    cache = FrameCache(tmp_path / "frames", 4, 4)
    dataset = sources.open_episodes(tmp_path / "set", frame_cache=cache)
    before = dataset.window(1, "images/top", 1, 3)
    assert before.shape == (2, 4, 4, 3)  # resized even before anything is cached
    cache.build(dataset)
    assert cache.missing(dataset) == []
    np.testing.assert_array_equal(dataset.window(1, "images/top", 1, 3), before)
    record = cache.record_path("top", dataset.frame_origin(1, "top"))
    np.save(record, np.full((4, 4, 4, 3), 50, np.uint8))
    assert (dataset.window(1, "images/top", 0, 4) == 50).all()  # it is the record that is read
    write(tmp_path / "set", 9, length=5)
    changed = sources.open_episodes(tmp_path / "set", frame_cache=cache)
    assert cache.missing(changed) == [(1, "top")]
