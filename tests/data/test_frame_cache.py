"""Records of decoded frames: damaged ones, those of several selections of episodes, and what a killed build leaves."""

import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from acrlpd import files
from acrlpd.cli.main import main
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.hdf5 import H5DatasetReader


@pytest.fixture
def demos(tmp_path):
    """Three demos with a camera; the mask ``last`` names the second and third."""
    path = tmp_path / "demos.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(3):
            demo = file.create_group(f"data/demo_{number}")
            for key, width in {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}.items():
                demo[f"obs/{key}"] = np.ones((5, width))
            demo["obs/top_image"] = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
            demo["actions"] = np.zeros((5, 2))
        file["mask/last"] = np.array([b"demo_1", b"demo_2"])
    return path


def header(*shape):
    return np.lib.format.magic(1, 0) + f"not a header of {shape}".encode().ljust(122)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: whole[:10],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: header(5, 4, 4, 3) + whole[128:],
        lambda whole: whole[:128].replace(b"(5, 4, 4, 3)", b"(4, 4, 5, 3)") + whole[128:],
        lambda whole: whole + b"more",
    ],
)
def test_a_damaged_record_is_named_and_made_anew(demos, tmp_path, damaged):
    folder = tmp_path / "frames"
    reader = H5DatasetReader(demos, frame_cache=FrameCache(folder, 4, 4))
    arguments = ["data", "cache", str(demos), str(folder), "--height", "4", "--width", "4"]
    assert main(arguments) == 0
    record = FrameCache(folder, 4, 4).record_path("top_image", reader.frame_origin(1, "top_image"))
    whole, frames = record.read_bytes(), reader.window(1, "images/top_image", 0, 5)
    record.write_bytes(damaged(whole))
    with pytest.raises(ValueError, match=rf"{record.name}: the record is damaged .*`acrlpd data cache`"):
        reader.window(1, "images/top_image", 0, 5)
    assert main(arguments) == 0
    assert record.read_bytes() == whole
    np.testing.assert_array_equal(reader.window(1, "images/top_image", 0, 5), frames)


def test_selections_of_a_data_set_share_their_records(demos, tmp_path, monkeypatch):
    cache = FrameCache(tmp_path / "frames", 4, 4)
    monkeypatch.chdir(tmp_path)
    some, every = H5DatasetReader("demos.hdf5", filter_key="last"), H5DatasetReader(demos)
    cache.build(some)
    assert cache.missing(every) == [(0, "top_image")]
    cache.build(every)
    assert cache.missing(some) == cache.missing(every) == []
    assert len(list(cache.folder.rglob("*.npy"))) == 3
    with h5py.File(demos, "r+") as file:
        file["data/demo_0/obs/top_image"][...] = 7
    os.utime(demos, (1, 1))
    cache.build(H5DatasetReader(demos, filter_key="last"))
    assert len(cache.missing(H5DatasetReader(demos))) == 1
    assert len(list(cache.folder.rglob("*.npy"))) == 3  # those of demo_1 and demo_2 took the place of their old ones


def test_what_a_killed_build_left_is_removed(demos, tmp_path):
    cache, reader = FrameCache(tmp_path / "frames", 4, 4), H5DatasetReader(demos)
    record = cache.record_path("top_image", reader.frame_origin(0, "top_image"))
    record.parent.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    ours, foreign = files.temporary_path(record), record.with_name(".notes.tmp")
    dead = ours.with_name(ours.name.replace(str(os.getpid()), str(process.pid)))
    elsewhere = dead.with_name(dead.name.replace(files.HOST, "another-machine"))
    for path in (ours, dead, foreign, elsewhere):
        path.write_bytes(b"half")
    files.remove_abandoned(record.parent)
    assert not dead.exists()
    dead.write_bytes(b"half")
    cache.build(reader)
    assert sorted(record.parent.glob(".*")) == sorted([foreign, elsewhere])  # ours became a record


def test_two_builds_may_replace_the_same_old_record(demos, tmp_path, monkeypatch):
    cache, glob = FrameCache(tmp_path / "frames", 4, 4), Path.glob
    cache.build(H5DatasetReader(demos))
    old = set(cache.folder.rglob("*.npy"))
    os.utime(demos, (1, 1))

    def first_there(folder, pattern):
        found = list(glob(folder, pattern))
        for path in old.intersection(found):
            path.unlink()  # by the other build
        return found

    monkeypatch.setattr(Path, "glob", first_there)
    cache.build(H5DatasetReader(demos))
    assert not cache.missing(H5DatasetReader(demos))
