"""Damaged LeRobot sets: one clear error each, or the bad episodes left out where that was asked for."""

import io
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from acrlpd.data import convert, hdf5
from acrlpd.data.hdf5 import H5DatasetReader
from acrlpd.data.inspection import inspect
from acrlpd.data.lerobot import LeRobotSource
from acrlpd.types import Episode

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def cases(shared, tmp_path_factory):
    """(folder, what is expected) by name."""
    script = shared / "data/make_broken.py"
    if not script.is_file():
        pytest.skip("this root has no make_broken.py")
    out = tmp_path_factory.mktemp("broken")
    subprocess.run([sys.executable, script, out, "lr21_", "lr30_"], check=True, capture_output=True)
    expected = json.loads((out / "expected.json").read_text(encoding="utf-8"))
    return {name: (out / case["path"], case) for name, case in expected.items()}


def read_all(folder, **options):
    source = LeRobotSource(folder, **options)
    for index in range(source.num_episodes):
        source.episode(index)
    return source


def error_of(folder, **options):
    """What reading everything complains about."""
    try:
        read_all(folder, **options)
    except (ValueError, OSError) as error:
        return str(error)
    return "read without an error"


def check_readable(source):
    """All numbers, and the frames at both ends of every episode."""
    for index, length in enumerate(source.lengths.tolist()):
        assert len(source.window(index, "actions", 0, length)) == length
        for frame in {0, length - 1}:
            for camera in source.cameras:
                assert source.window(index, f"images/{camera}", frame, frame + 1).any()


def unmentioned(text, folder, case):
    """Words that the message lacks; the case's own name in the path does not count."""
    text = text.replace(str(folder), "").lower()
    return [words for words in case["mentions"] if not any(word.lower() in text for word in words)]


@pytest.mark.reference
def test_errors_are_clear(cases):
    faults = {name: case for name, case in cases.items() if case[1]["expect"] == "error"}
    assert faults
    for name, (folder, case) in faults.items():
        message = error_of(folder)
        assert not unmentioned(message, folder, case), f"{name}: {message}"


@pytest.mark.reference
def test_skipping_leaves_the_good_episodes(cases):
    skippable = {name: case for name, case in cases.items() if case[1]["good_episodes"] is not None}
    assert skippable
    for name, (folder, case) in skippable.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = LeRobotSource(folder, on_bad_episode="skip")
        check_readable(source)
        assert source.numbers == case["good_episodes"], name
        told = "\n".join(str(warning.message) for warning in caught)
        if case["expect"] == "error":
            assert not unmentioned(told, folder, case), f"{name}: {told}"
            assert len(source.skipped) == len(source.meta.episodes) - len(case["good_episodes"]), name
        else:
            assert told == "", name
            assert source.skipped == [], name


@pytest.mark.reference
def test_a_fault_of_the_whole_set_cannot_be_skipped(cases):
    hopeless = {name: case for name, case in cases.items() if case[1]["good_episodes"] is None}
    assert hopeless
    for name, (folder, case) in hopeless.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = error_of(folder, on_bad_episode="skip")
        assert not unmentioned(message, folder, case), f"{name}: {message}"


@pytest.mark.reference
def test_unusual_but_valid_sets_are_read(cases):
    valid = {name: case for name, case in cases.items() if case[1]["expect"] == "ok"}
    assert valid
    for name, (folder, case) in valid.items():
        assert read_all(folder).numbers == case["good_episodes"], name


@pytest.mark.reference
def test_rows_left_are_those_of_the_good_episodes(cases):
    for folder, case in cases.values():
        if case["expect"] == "ok" or case["good_episodes"] is None:
            continue
        chosen = LeRobotSource(folder, episodes=case["good_episodes"], cameras=())  # the faults of others do not matter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left = LeRobotSource(folder, on_bad_episode="skip")
        for index, length in enumerate(chosen.lengths.tolist()):
            for key in ("state", "actions"):
                np.testing.assert_array_equal(
                    left.window(index, key, 0, length), chosen.window(index, key, 0, length), err_msg=str(folder)
                )


STEPS, FPS = 12, 10.0


def written(root, pictures, monkeypatch, *, steps=STEPS):
    """A LeRobot set of three episodes, each with an mp4 of its own where it has videos."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setattr(convert, "VIDEO_FILE_MB", 0)
    monkeypatch.setattr(convert, "DATA_FILE_MB", 0)
    for number in range(3):
        rng = np.random.default_rng(number)
        episode = Episode(
            state=rng.normal(size=(steps, 2)).astype(np.float32),
            actions=rng.normal(size=(steps, 1)).astype(np.float32),
            rewards=np.zeros(steps, np.float32),
            terminals=np.zeros(steps, bool),
            task="lift",
            images={"top": rng.integers(0, 256, (steps, 64, 96, 3), np.uint8)},
            success=True,
        )
        hdf5.write_episode(hdf5.episode_path(root / "own", number), episode)
    return convert.to_lerobot(H5DatasetReader(root / "own"), root / "set", fps=FPS, pictures=pictures)


def change_column(path, key, change):
    """Rewrites a parquet file with ``change(cells)`` in one column."""
    table = pq.ParquetFile(path).read()
    at = table.schema.get_field_index(key)
    cells = change(table[key].to_pylist())
    array = cells if isinstance(cells, pa.Array) else pa.array(cells, table.schema.field(key).type)
    pq.write_table(table.set_column(at, key, array), path)


def shrink_images(folder, frames):
    def change(cells):
        for frame in frames:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(cells[frame]["bytes"])).resize((48, 32)).save(buffer, "PNG")
            cells[frame]["bytes"] = buffer.getvalue()
        return cells

    change_column(folder / "data/chunk-000/file-001.parquet", "observation.images.top", change)


def shrink_video(folder):
    path = folder / "videos/observation.images.top/chunk-000/file-001.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(FPS))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(STEPS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())


def damage_video(folder):
    """Its packets stay where they are, but what they hold is noise."""
    path = folder / "videos/observation.images.top/chunk-000/file-001.mp4"
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.pts is not None]
    content = bytearray(path.read_bytes())
    for start, size in packets[4:8]:
        content[start : start + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)


ODD_SIZES = {
    "video": ("h264", shrink_video),
    "all images": ("png", lambda folder: shrink_images(folder, range(STEPS))),
}
FAULTY_PICTURES = ODD_SIZES | {
    "one image": ("png", lambda folder: shrink_images(folder, [5])),
    "damaged video": ("h264", damage_video),
}


@pytest.mark.parametrize(("pictures", "spoil"), ODD_SIZES.values(), ids=ODD_SIZES)
def test_pictures_of_another_size_are_an_error_when_opening(tmp_path, monkeypatch, pictures, spoil):
    folder = written(tmp_path, pictures, monkeypatch)
    spoil(folder)
    with pytest.raises(ValueError, match=r"episode 1: observation\.images\.top: expected pictures of 64x96 .*32x48"):
        LeRobotSource(folder)
    assert LeRobotSource(folder, cameras=()).num_episodes == 3


@pytest.mark.parametrize(("pictures", "spoil"), FAULTY_PICTURES.values(), ids=FAULTY_PICTURES)
def test_episodes_with_faulty_pictures_are_left_out(tmp_path, monkeypatch, pictures, spoil):
    folder = written(tmp_path, pictures, monkeypatch)
    spoil(folder)
    with pytest.warns(UserWarning, match=r"left out: .*episode 1: observation\.images\.top: "):
        source = LeRobotSource(folder, on_bad_episode="skip")
    assert source.numbers == [0, 2]
    source.check_frames()
    found = inspect(folder, decode=True)
    assert not found.usable
    assert found.contents.episodes == 2
    with pytest.raises(ValueError, match=r"episode 1: observation\.images\.top"):
        convert.to_hdf5(LeRobotSource(folder), tmp_path / "new")


def test_an_image_of_another_size_is_named_when_it_is_read(tmp_path, monkeypatch):
    folder = written(tmp_path, "png", monkeypatch)
    shrink_images(folder, [5])
    source = LeRobotSource(folder)
    assert source.window(1, "images/top", 0, 5).shape == (5, 64, 96, 3)
    with pytest.raises(ValueError, match=r"episode 1: observation\.images\.top: frame 5: expected pictures of 64x96"):
        source.window(1, "images/top", 5, 6)
