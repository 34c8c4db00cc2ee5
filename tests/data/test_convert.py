"""There and back: numbers exactly, pictures exactly or within what a codec loses."""

import contextlib
import dataclasses
import json
import os
import resource
import subprocess

import numpy as np
import pytest

from acrlpd import files
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.sources import open_episodes
from acrlpd.data.tools import convert
from acrlpd.types import Episode

pytest.importorskip("pyarrow")
av = pytest.importorskip("av")


def make_episode(number, length, *, success) -> Episode:
    rng = np.random.default_rng(number)
    row, column, step = np.ogrid[:64, :96, :length]
    grey = ((row + 2 * column + 3 * step + 40 * number) % 256).transpose(2, 0, 1).astype(np.uint8)  # [t h w]
    terminals = np.zeros(length, bool)
    terminals[length // 2] = number == 1  # in mid-episode, as in relabelled play data
    return Episode(
        state=rng.normal(size=(length, 3)).astype(np.float32),
        actions=rng.normal(size=(length, 1)).astype(np.float32),
        rewards=rng.normal(size=length).astype(np.float32),
        terminals=terminals,
        task="öffne" if number else "close",
        task_changes=((2, "close"), (length - 1, "")) if number == 2 else (),
        images={"top": np.repeat(grey[..., None], 3, axis=-1), "wrist": np.repeat(255 - grey[..., None], 3, axis=-1)},
        success=success,
    )


def written(folder, successes=(True, False, True), fps=20.0):
    for number, success in enumerate(successes):
        metadata = {} if fps is None else {"fps": fps}
        hdf5.write_episode(
            hdf5.episode_path(folder, number), make_episode(number, 3 + 4 * number, success=success), metadata
        )
    return H5DatasetReader(folder)


def assert_same(found, expected, *, tolerance=0.0):
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.fps == expected.fps
    assert set(found.cameras) == set(expected.cameras)
    for index in range(expected.num_episodes):
        ours, theirs = found.episode(index), expected.episode(index)
        for key in ("state", "actions", "rewards", "terminals"):
            np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key), err_msg=key)
        assert (ours.task, ours.task_changes, ours.success) == (theirs.task, theirs.task_changes, theirs.success)
        for camera, frames in theirs.images.items():
            error = np.abs(ours.images[camera].astype(float) - frames).mean()
            assert error <= tolerance, f"{camera}: {error}"


@pytest.mark.parametrize(("pictures", "tolerance"), [("png", 0.0), ("h264", 3.0), ("av1", 4.0)])
def test_to_lerobot_and_back(tmp_path, pictures, tolerance):
    source = written(tmp_path / "own")
    lerobot = LeRobotSource(convert.to_lerobot(source, tmp_path / "lerobot", pictures=pictures))
    assert lerobot.format == "lerobot v3.0"
    assert_same(lerobot, source, tolerance=tolerance)
    LeRobotSource(tmp_path / "lerobot", check_images=True)
    back = H5DatasetReader(convert.to_hdf5(lerobot, tmp_path / "back"))
    assert_same(back, lerobot)
    assert hdf5.read_metadata(hdf5.episode_path(tmp_path / "back", 1))["fps"] == 20


def test_unknown_success_and_rate(tmp_path):
    source = written(tmp_path / "own", successes=(None, None), fps=None)
    with pytest.raises(ValueError, match="give fps"):
        convert.to_lerobot(source, tmp_path / "lerobot")
    assert not (tmp_path / "lerobot").exists()
    lerobot = LeRobotSource(convert.to_lerobot(source, tmp_path / "lerobot", fps=12.5, pictures="png"))
    assert lerobot.fps == 12.5
    assert [lerobot.info(index).success for index in range(2)] == [None, None]
    mixed = written(tmp_path / "mixed", successes=(True, None))
    with pytest.raises(ValueError, match=r"episode_000001\.hdf5: success: unknown in 1 of 2 episodes"):
        convert.to_lerobot(mixed, tmp_path / "other")


@pytest.mark.parametrize("convert_to", [convert.to_hdf5, convert.to_lerobot])
def test_what_had_no_rewards_gets_the_same_ones_from_success(shared, tmp_path, convert_to):
    """The zeros in the copy are nobody's rewards."""
    rewards = RewardConfig(convention="0/1")
    droid = shared / "data" / "h5-droid"
    copy = open_episodes(convert_to(open_episodes(droid), tmp_path / "copy"), rewards=rewards)
    original = open_episodes(droid, rewards=rewards)
    sums = [[data.episode(index).rewards.sum() for index in range(data.num_episodes)] for data in (original, copy)]
    assert sums[0] == sums[1]
    assert sorted(sums[0]) != [0.0] * len(sums[0])
    unknown = convert_to(open_episodes(shared / "data" / "h5-aloha" / "sim_raw", fps=50), tmp_path / "unknown")
    with pytest.raises(ValueError, match="success: rewards were asked for"):
        open_episodes(unknown, rewards=rewards)


def test_frames_keep_their_times_in_long_episodes(tmp_path):
    length = int(150 * 14.2857)  # s; with 100/7 instead, frames are too late after 100
    frames = np.zeros((length, 16, 16, 3), np.uint8)
    episode = dataclasses.replace(make_episode(0, length, success=True), images={"top": frames})
    hdf5.write_episode(hdf5.episode_path(tmp_path / "own", 0), episode, {"fps": 14.2857})
    convert.to_lerobot(H5DatasetReader(tmp_path / "own"), tmp_path / "new", pictures="h264")
    LeRobotSource(tmp_path / "new", check_images=True)


@pytest.mark.parametrize(("fps", "rate"), [(30000 / 1001, (30000, 1001)), (29.97, (2997, 100)), (50.0, (50, 1))])
def test_a_video_has_the_rate_of_television_where_that_is_meant(tmp_path, fps, rate):
    convert.to_lerobot(written(tmp_path / "own", fps=fps), tmp_path / "new", pictures="h264")
    path = next((tmp_path / "new").rglob("*.mp4"))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate.as_integer_ratio() == rate


@pytest.mark.parametrize(
    ("fps", "pictures", "fits"),
    [
        *((1e-4, "h264", True), (1e-4, "av1", True), (9e-5, "h264", False), (1e-9, "png", True)),
        *((1000, "h264", True), (1001, "h264", False), (240, "av1", True), (240.5, "av1", False)),
    ],
)
def test_rates_that_a_video_cannot_hold_are_refused(tmp_path, fps, pictures, fits):
    source = written(tmp_path / "own", fps=fps)
    if fits:
        convert.to_lerobot(source, tmp_path / "new", pictures=pictures)
        LeRobotSource(tmp_path / "new", check_images=True)
    else:
        with pytest.raises(ValueError, match=rf"{pictures} videos hold 0\.0001 to .*the rate is"):
            convert.to_lerobot(source, tmp_path / "new", pictures=pictures)
        assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("convert_to", [convert.to_hdf5, convert.to_lerobot])
def test_what_cannot_be_read_back_is_named_by_where_it_was_to_be(tmp_path, monkeypatch, convert_to):
    source = written(tmp_path / "own")

    def spoil(folder):
        raise ValueError(f"{folder}: episode 0: no video frame")

    monkeypatch.setattr(convert, "H5DatasetReader", spoil)
    monkeypatch.setattr(convert, "LeRobotSource", spoil)
    with pytest.raises(ValueError, match=rf"not be readable: {tmp_path}/new: episode 0: no video frame"):
        convert_to(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_files_begin_anew_at_their_size_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "VIDEO_FILE_MB", 0)
    monkeypatch.setattr(convert, "DATA_FILE_MB", 0)
    source = written(tmp_path / "own")
    folder = convert.to_lerobot(source, tmp_path / "lerobot", pictures="h264")
    assert len(list(folder.rglob("*.mp4"))) == 2 * 3
    assert len(list((folder / "data").rglob("*.parquet"))) == 3
    assert_same(LeRobotSource(folder), source, tolerance=3.0)


def test_statistics_are_lerobots(tmp_path):
    source = written(tmp_path / "own")
    folder = convert.to_lerobot(source, tmp_path / "lerobot", pictures="png")
    stats = json.loads((folder / "meta/stats.json").read_text())
    state = np.concatenate([source.window(index, "state", 0, int(n)) for index, n in enumerate(source.lengths)])
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.state"]["min"], state.min(axis=0))
    assert stats["observation.state"]["count"] == [len(state)]
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)
    assert 0 <= stats["observation.images.top"]["min"][0][0][0] < stats["observation.images.top"]["max"][0][0][0] <= 1


def test_nothing_is_left_of_a_failure(tmp_path):
    source = written(tmp_path / "own")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken already exists"):
        convert.to_hdf5(source, tmp_path / "taken")
    hdf5.episode_path(tmp_path / "own", 2).write_bytes(b"")
    for convert_to in (convert.to_hdf5, convert.to_lerobot):
        with pytest.raises(ValueError, match=r"episode_000002\.hdf5"):
            convert_to(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "taken"]


def test_a_folder_that_came_into_being_meanwhile_is_kept(tmp_path, monkeypatch):
    source, check = written(tmp_path / "own"), convert._read_back

    def beside(reader, temporary, folder):
        (folder / "other").mkdir(parents=True)
        check(reader, temporary, folder)

    monkeypatch.setattr(convert, "_read_back", beside)
    with pytest.raises(FileExistsError, match="new exists already"):
        convert.to_hdf5(source, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    ours = files.temporary_path(tmp_path / "set")
    dead = ours.with_name(ours.name.replace(f"-{os.getpid()}.", f"-{process.pid}."))
    (dead / "meta").mkdir(parents=True)
    convert.to_hdf5(written(tmp_path / "ours"), tmp_path / "set")
    assert not dead.exists()


def test_a_size_the_codec_refuses_is_named(tmp_path):
    episode = make_episode(0, 3, success=True)
    odd = dataclasses.replace(episode, images={"top": episode.images["top"][:, :63, :95]})
    hdf5.write_episode(hdf5.episode_path(tmp_path / "own", 0), odd, {"fps": 10})
    with pytest.raises(ValueError, match=r"observation\.images\.top: libx264 cannot encode frames of 63x95.*png"):
        convert.to_lerobot(H5DatasetReader(tmp_path / "own"), tmp_path / "new", pictures="h264")


@contextlib.contextmanager
def file_size_limit(nbytes):
    """As ``ulimit -f``, and much like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("convert_to", "options"),
    [
        (convert.to_hdf5, {"compression": "gzip"}),
        (convert.to_hdf5, {}),
        (convert.to_lerobot, {"pictures": "h264"}),
        (convert.to_lerobot, {"pictures": "png"}),
    ],
)
def test_no_room_to_write_is_told_as_such(tmp_path, convert_to, options):
    source = written(tmp_path / "own")
    with file_size_limit(2000), pytest.raises(OSError, match=r"File too large; nothing was kept.*new"):
        convert_to(source, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("pictures", ["h264", "png"])
def test_pictures_of_another_size_are_refused_and_not_rescaled(tmp_path, monkeypatch, pictures):
    source = written(tmp_path / "own")
    whole = source.episode

    def episode(index):
        found = whole(index)
        images = {name: frames[:, :48] if index == 1 else frames for name, frames in found.images.items()}
        return dataclasses.replace(found, images=images)

    monkeypatch.setattr(source, "episode", episode)
    told = r"000001\.hdf5: observation\.images\.top: expected pictures of 64x96.*found pictures of 48x96"
    with pytest.raises(ValueError, match=told):
        convert.to_lerobot(source, tmp_path / "new", pictures=pictures)
    assert not (tmp_path / "new").exists()


@pytest.mark.reference
@pytest.mark.slow
def test_reference_videos_there_and_back(shared, tmp_path):
    sets = [path.parent.parent for path in sorted((shared / "data").rglob("meta/info.json"))]
    sets = [path for path in sets if "video" in path.name][:2]
    if not sets:
        pytest.skip("this root has no LeRobot videos")
    for number, path in enumerate(sets):
        source = LeRobotSource(path)
        own = H5DatasetReader(convert.to_hdf5(source, tmp_path / f"own{number}"))
        assert_same(own, source)
        assert_same(LeRobotSource(convert.to_lerobot(own, tmp_path / f"new{number}")), source, tolerance=4.0)
