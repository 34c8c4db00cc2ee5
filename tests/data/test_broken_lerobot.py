"""Damaged LeRobot sets: one clear error each, or the bad episodes left out where that was asked for."""

import contextlib
import dataclasses
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from acrlpd.data import statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot import checks
from acrlpd.data.formats.lerobot.meta import EpisodeRow
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.formats.parquet import DataError
from acrlpd.data.store import windows
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.data.tools import convert
from acrlpd.data.tools.inspection import inspect
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


def enlarge_claimed_size(folder):
    """The header of one image says 60000x60000, with the right checksum."""

    def change(cells):
        content = bytearray(cells[5]["bytes"])
        content[16:24] = struct.pack(">II", 60000, 60000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        cells[5]["bytes"] = bytes(content)
        return cells

    change_column(folder / "data/chunk-000/file-001.parquet", "observation.images.top", change)


def shrink_video(folder):
    write_video(folder, STEPS, 32, 48)


def write_video(folder, steps, height, width):
    path = folder / "videos/observation.images.top/chunk-000/file-001.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(FPS))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        frame = np.zeros((height, width, 3), np.uint8)
        for _ in range(steps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def shorten_video(folder):
    write_video(folder, STEPS - 2, 64, 96)


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
SEEN_WITHOUT_DECODING = ODD_SIZES | {
    "one image": ("png", lambda folder: shrink_images(folder, [5])),
    "enormous image": ("png", enlarge_claimed_size),
    "short video": ("h264", shorten_video),
}
FAULTY_PICTURES = SEEN_WITHOUT_DECODING | {
    "damaged video": ("h264", damage_video),
}


@pytest.mark.parametrize(("pictures", "spoil"), ODD_SIZES.values(), ids=ODD_SIZES)
def test_pictures_of_another_size_are_an_error_when_opening_for_training(tmp_path, monkeypatch, pictures, spoil):
    folder = written(tmp_path, pictures, monkeypatch)
    spoil(folder)
    for options in ({}, {"metadata_cache": MetadataCache(tmp_path / "cache")}):
        with pytest.raises(
            ValueError, match=r"episode 1: observation\.images\.top: expected pictures of 64x96 .*32x48"
        ):
            windows.open_store(LeRobotSource(folder, **options))
    assert windows.open_store(LeRobotSource(folder, cameras=())).num_episodes == 3


def test_a_frame_cache_gives_videos_of_any_size_one_size(tmp_path, monkeypatch):
    folder = written(tmp_path, "h264", monkeypatch)
    shrink_video(folder)
    store = windows.open_store(LeRobotSource(folder, frame_cache=FrameCache(tmp_path / "frames", 8, 8)))
    assert store.images["top"][np.arange(3 * STEPS)].shape == (3 * STEPS, 8, 8, 3)


def test_no_video_is_opened_before_pictures_are_asked_for(tmp_path, monkeypatch):
    folder = written(tmp_path, "h264", monkeypatch)
    for path in folder.rglob("*.mp4"):
        path.write_bytes(b"no video")
    source = LeRobotSource(folder)
    assert len(statistics.from_sources([source])["state"].mean) == source.window(0, "state", 0, 1).shape[1]
    with pytest.raises(ValueError, match=r"file-000\.mp4: episode 0: .* cannot be opened"):
        windows.open_store(source)


@pytest.mark.parametrize(("pictures", "spoil"), FAULTY_PICTURES.values(), ids=FAULTY_PICTURES)
def test_episodes_with_faulty_pictures_are_left_out(tmp_path, monkeypatch, pictures, spoil):
    folder = written(tmp_path, pictures, monkeypatch)
    spoil(folder)
    with pytest.warns(UserWarning, match=r"left out: .*episode 1: observation\.images\.top: "):
        source = LeRobotSource(folder, on_bad_episode="skip")
    assert source.numbers == [0, 2]
    windows.open_store(source)  # reads every picture
    found = inspect(folder, decode=True)
    assert not found.usable
    assert found.contents.episodes == 2
    with pytest.raises(ValueError, match=r"episode 1: observation\.images\.top"):
        convert.to_hdf5(LeRobotSource(folder), tmp_path / "new")


@pytest.mark.parametrize(("pictures", "spoil"), SEEN_WITHOUT_DECODING.values(), ids=SEEN_WITHOUT_DECODING)
def test_inspect_sees_what_needs_no_decoding(tmp_path, monkeypatch, pictures, spoil):
    folder = written(tmp_path, pictures, monkeypatch)
    spoil(folder)
    found = inspect(folder)
    assert [problem.episode for problem in found.problems] == ["episode_000001"]
    assert found.contents.episodes == 2


def test_an_image_of_another_size_is_named_when_it_is_read(tmp_path, monkeypatch):
    folder = written(tmp_path, "png", monkeypatch)
    shrink_images(folder, [5])
    source = LeRobotSource(folder)
    assert source.window(1, "images/top", 0, 5).shape == (5, 64, 96, 3)
    with pytest.raises(ValueError, match=r"episode 1: observation\.images\.top: frame 5: expected pictures of 64x96"):
        source.window(1, "images/top", 5, 6)


def write_tables(folder, version):
    """The tables of one episode of three steps with a camera, but for the pictures themselves."""
    v3 = version == "v3.0"
    dtypes = {"observation.state": "float32", "action": "float32", "timestamp": "float32"}
    features = {
        key: {"dtype": dtypes.get(key, "int64"), "shape": [1]}
        for key in (*dtypes, "frame_index", "episode_index", "index", "task_index")
    }
    features["observation.images.top"] = {"dtype": "video", "shape": [8, 8, 3]}
    path = "{chunk_index}/{file_index}" if v3 else "{episode_chunk}/{episode_index}"
    info = {
        "codebase_version": version,
        "fps": 10,
        "total_episodes": 1,
        "total_frames": 3,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_path": f"data/{path}.parquet",
        "video_path": f"{{video_key}}/{path}.mp4",
        "features": features,
    }
    episode = {"episode_index": 0, "length": 3}
    task = {"task_index": 0, "task": "lift"}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "data/0").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    if v3:
        episode |= {"dataset_from_index": 0, "dataset_to_index": 3, "data/chunk_index": 0, "data/file_index": 0}
        video = {"chunk_index": 0, "file_index": 0, "from_timestamp": 0.0, "to_timestamp": 0.3}
        episode |= {f"videos/observation.images.top/{key}": value for key, value in video.items()}
    (folder / "meta/episodes.jsonl").write_text(json.dumps(episode))
    (folder / "meta/tasks.jsonl").write_text(json.dumps(task))
    if v3:
        write_rows(folder / V3_EPISODES, [episode])
        write_rows(folder / V3_TASKS, [task])
    steps = np.arange(3)
    columns = {key: np.zeros(3, np.dtype(feature["dtype"])) for key, feature in features.items() if "images" not in key}
    columns |= {"timestamp": (steps / 10).astype(np.float32), "frame_index": steps, "index": steps}
    pq.write_table(pa.table(columns), folder / "data/0/0.parquet")
    return folder


V3_EPISODES, V3_TASKS = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"
NOTHING = object()  # instead of a value: the key is deleted
WRONG = [None, "x", -1, [], {}, True, 1.5, float("nan"), float("inf"), 10**400, "{", "{0}", "{video_key:d}", NOTHING]


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def replaced(content, place, value):
    """``content`` with another value at a place, named by its keys."""
    if not place:
        return value
    changed = dict(content)
    changed[place[0]] = replaced(content[place[0]], place[1:], value)
    return {key: each for key, each in changed.items() if each is not NOTHING}


def places(content, before=()):
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from places(value, (*before, key))


def opens_or_tells(folder):
    """Without the camera, whose pictures are not there."""
    try:
        LeRobotSource(folder, cameras=())
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("table", ["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"])
def test_no_value_of_a_table_is_taken_for_granted(tmp_path, version, table):
    folder = write_tables(tmp_path / "set", version)
    assert opens_or_tells(folder) is None
    good = json.loads((folder / table).read_text())
    parquet = version == "v3.0" and {"meta/episodes.jsonl": V3_EPISODES, "meta/tasks.jsonl": V3_TASKS}.get(table)
    for place in places(good):
        for value in WRONG:
            content = replaced(good, place, value)
            if not parquet:
                (folder / table).write_text(json.dumps(content))
            elif value in ({}, 10**400):
                continue  # parquet cannot hold them
            else:
                write_rows(folder / parquet, [content])
            error = opens_or_tells(folder)  # any other exception ends the test
            assert error is None or str(folder) in error, (place, value)
            if value is None and place[-2:] != ("observation.images.top", "shape"):  # which nothing needs
                assert error is not None, place
                assert place[-1] in error


@pytest.mark.parametrize("content", ["{", "\udcff", "[" * 100_000, "[1]"], ids=["cut", "latin1", "deep", "list"])
@pytest.mark.parametrize("table", ["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"])
def test_text_that_is_no_table_is_told(tmp_path, table, content):
    folder = write_tables(tmp_path / "set", "v2.1")
    (folder / table).write_text(content, "utf-8", "surrogateescape")
    assert table in opens_or_tells(folder)


def test_a_copy_beside_the_episode_table_is_named(tmp_path):
    folder = write_tables(tmp_path / "set", "v3.0")
    (folder / "meta/episodes/chunk-000/file-000 (copy).parquet").write_bytes((folder / V3_EPISODES).read_bytes())
    assert "file-000 (copy).parquet: expected a name like" in opens_or_tells(folder)


def test_a_column_that_occurs_twice_in_the_episode_table_is_named(tmp_path):
    folder = write_tables(tmp_path / "set", "v3.0")
    table = pq.ParquetFile(folder / V3_EPISODES).read()
    pq.write_table(table.append_column("length", table["length"]), folder / V3_EPISODES)
    assert "file-000.parquet: column 'length' occurs more than once" in opens_or_tells(folder)


SPOILT_COLUMNS = {
    "a number beyond float32": ("observation.state", pa.array([[0.0, 0.0]] * 3 + [[0.0, 1e300]] + [[0.0, 0.0]] * 8)),
    "a reward beyond float32": ("next.reward", pa.array([0.0] * 11 + [-1e300])),
    "an index of text": ("index", pa.array(["0"] * STEPS)),
    "a timestamp 1 ms late": ("timestamp", pa.array([t / FPS + 0.001 * (t > 5) for t in range(STEPS)], pa.float32())),
    "images that are bytes": ("observation.images.top", pa.array([b"x"] * STEPS)),
}


@pytest.mark.parametrize(("key", "cells"), SPOILT_COLUMNS.values(), ids=SPOILT_COLUMNS)
def test_a_spoilt_column_is_named(tmp_path, monkeypatch, key, cells):
    folder = written(tmp_path, "png", monkeypatch)
    change_column(folder / "data/chunk-000/file-001.parquet", key, lambda _: cells)
    with pytest.raises(ValueError, match=rf"file-001\.parquet: episode 1: {key}: .*expected"):
        LeRobotSource(folder)
    with pytest.warns(UserWarning, match="1 of 3 episodes were left out"):
        assert LeRobotSource(folder, on_bad_episode="skip").numbers == [0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_index": [3, 3, 3], "index": [9, 10, 11]}, None),
        ({"episode_index": [4, 4, 4]}, "episode_index: expected 3 in every frame, found 4 in frame 0"),
        ({"episode_index": [3, 3, 4]}, "episode_index: expected 3 in every frame, found 4 in frame 2"),
        ({"index": [9, 9, 9]}, "index: expected 10, one after another, found 9 in frame 1"),
        ({"index": [9, 11, 10]}, "index: expected 10, one after another, found 11 in frame 1"),
    ],
)
def test_a_file_of_its_own_holds_that_episode(tmp_path, changes, message):
    row = EpisodeRow(3, 3, tmp_path / "episode_000003.parquet", indices=None, videos={})
    columns = {"episode_index": [3, 3, 3], "index": [9, 10, 11]} | changes
    table = {key: np.array(values) for key, values in columns.items()}
    if message is None:
        assert checks.first_row(row, table) == 0
    else:
        with pytest.raises(DataError, match=message):
            checks.first_row(row, table)


HOUR = 108_000  # steps at 30 a second: float32 tells times an hour in apart by no less than 0.24 ms


@pytest.mark.parametrize(("late_s", "wrong"), [(0.0, False), (0.001, True)])
def test_the_clock_of_an_hour_in_float32(late_s, wrong):
    steps = np.arange(HOUR)
    times = (steps / 30 + late_s * (steps >= HOUR - 10)).astype(np.float32)
    rows = {"timestamp": times, "frame_index": steps}
    with pytest.raises(DataError, match=rf"from frame {HOUR - 11} to") if wrong else contextlib.nullcontext():
        checks.check_clock(rows, 30, 1e-4)


def test_frames_after_an_hour_are_found(tmp_path, monkeypatch):
    """The mp4's own times are exact; the table's are off by up to 0.12 ms there, and the tolerance is 0.1 ms."""
    folder = written(tmp_path, "h264", monkeypatch)
    source = LeRobotSource(folder)
    monkeypatch.setattr(source._files, "rows", lambda facts, key: (np.arange(HOUR) / 30).astype(np.float32))
    source._files.meta = dataclasses.replace(source.meta, fps=30.0)
    times = source._files.frame_times(source._facts[0], "observation.images.top")
    np.testing.assert_allclose(times, np.arange(HOUR) / 30, rtol=0, atol=1e-9)
    late = np.arange(HOUR) / 30 + 0.001  # a stated time that is no rounding counts as it is
    monkeypatch.setattr(source._files, "rows", lambda facts, key: late)
    np.testing.assert_array_equal(source._files.frame_times(source._facts[0], "observation.images.top"), late)
