"""Tables of LeRobot sets that send episodes to other frames than their own: told at opening, by every command alike."""

import json
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.store import windows
from acrlpd.data.tools import convert
from acrlpd.data.tools.inspection import inspect
from acrlpd.types import Episode

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")

FPS, LENGTHS = 10, [7, 5, 9, 6, 6]
CAMERAS = {"top": [0, 0, 1, 1, 1], "wrist": [0, 1, 1, 1, 2]}  # the file of each episode, in either camera
TABLE = "meta/episodes/chunk-000/file-000.parquet"


def level(number):
    return 30 + 40 * number


def column(camera, name):
    return f"videos/observation.images.{camera}/{name}"


def mp4(folder, camera, file):
    return folder / f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"


def write_mp4(path, levels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "5"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for value in levels:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_rows(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / TABLE)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A v3.0 set of two cameras, whose files roll over independently."""
    root = tmp_path_factory.mktemp("good")
    for number, length in enumerate(LENGTHS):
        numbers = np.random.default_rng(number).normal(size=(length, 2)).astype(np.float32)
        images = {camera: np.zeros((length, 8, 8, 3), np.uint8) for camera in CAMERAS}
        episode = Episode(numbers, numbers, numbers[:, 0], np.zeros(length, bool), "lift", images=images, success=True)
        hdf5.write_episode(hdf5.episode_path(root / "own", number), episode, {"fps": FPS})
    folder = convert.to_lerobot(H5DatasetReader(root / "own"), root / "set", pictures="h264")
    rows = pq.ParquetFile(folder / TABLE).read().to_pylist()
    for camera, files in CAMERAS.items():
        for file in set(files):
            own = [number for number in range(len(LENGTHS)) if files[number] == file]
            write_mp4(mp4(folder, camera, file), [level(number) for number in own for _ in range(LENGTHS[number])])
            ends = np.cumsum([LENGTHS[number] for number in own]).tolist()
            for number, end in zip(own, ends, strict=True):
                start = end - LENGTHS[number]
                place = {"file_index": file, "from_timestamp": start / FPS, "to_timestamp": end / FPS}
                rows[number] |= {column(camera, name): value for name, value in place.items()}
    write_rows(folder, rows)
    return folder


def fault_of(folder, **options):
    """What a run with these options stops at: when it opens the data, or before it reads pictures."""
    try:
        windows.open_store(LeRobotSource(folder, **options))
    except ValueError as error:
        return str(error)
    return None


def opened_without(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LeRobotSource(folder, on_bad_episode="skip", **options)


def check_frames(source):
    for index, number in enumerate(source.numbers):
        for camera in source.cameras:
            frames = source.window(index, f"images/{camera}", 0, LENGTHS[number])
            np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), level(number), atol=4)


def spoilt(good, tmp_path_factory, change):
    """A copy of the set, with other rows of the episode table."""
    folder = shutil.copytree(good, tmp_path_factory.mktemp("spoilt") / "set")
    rows = pq.ParquetFile(folder / TABLE).read().to_pylist()
    change(rows)
    write_rows(folder, rows)
    return folder


def test_a_good_table(good):
    source = LeRobotSource(good)
    check_frames(source)
    assert fault_of(good) is None
    assert inspect(good).problems == []


def moved(rows, camera, at, _, frames):
    for name in ("from_timestamp", "to_timestamp"):
        rows[at][column(camera, name)] += frames / FPS


def all_behind_moved(rows, camera, at, other, frames):
    for number in range(at, len(rows)):
        if rows[number][column(camera, "file_index")] == rows[at][column(camera, "file_index")]:
            moved(rows, camera, number, other, frames)


def begins_elsewhere(rows, camera, at, _, frames):
    rows[at][column(camera, "from_timestamp")] += frames / FPS


def ends_elsewhere(rows, camera, at, _, frames):
    rows[at][column(camera, "to_timestamp")] += frames / FPS


def in_another_file(rows, camera, at, other, _):
    rows[at][column(camera, "file_index")] = rows[other][column(camera, "file_index")]


def exchanged(rows, camera, at, other, _):
    for name in ("file_index", "from_timestamp"):
        key = column(camera, name)
        rows[at][key], rows[other][key] = rows[other][key], rows[at][key]
    for number in (at, other):
        rows[number][column(camera, "to_timestamp")] = (
            rows[number][column(camera, "from_timestamp")] + LENGTHS[number] / FPS
        )


def files_exchanged(rows, camera, at, other, _):
    key = column(camera, "file_index")
    names = {rows[at][key]: rows[other][key], rows[other][key]: rows[at][key]}
    for row in rows:
        row[key] = names.get(row[key], row[key])


def merged(rows, camera, *_):
    for row in rows:
        row[column(camera, "file_index")] = 1


CHANGES = [
    moved,
    all_behind_moved,
    begins_elsewhere,
    ends_elsewhere,
    in_another_file,
    exchanged,
    files_exchanged,
    merged,
]


@given(
    change=st.sampled_from(CHANGES),
    camera=st.sampled_from(list(CAMERAS)),
    at=st.integers(0, 4),
    other=st.integers(0, 4),
    frames=st.integers(1, 9) | st.integers(-9, -1),
)
@settings(deadline=None, max_examples=30)
def test_no_spoilt_table_gives_wrong_frames(good, tmp_path_factory, change, camera, at, other, frames):
    """It is refused, and without the episodes at fault the others are read right."""
    folder = spoilt(good, tmp_path_factory, lambda rows: change(rows, camera, at, other, frames))
    true, stated = (pq.ParquetFile(root / TABLE).read().to_pylist() for root in (good, folder))
    wrong = [number for number, row in enumerate(stated) if row != true[number]]
    fault, found = fault_of(folder), inspect(folder)
    if change is exchanged and LENGTHS[at] == LENGTHS[other] and wrong:  # another partition: its order is odd, not more
        assert fault is None
        assert "mixed them up" in found.problems[0].text
    elif not wrong:
        assert fault is None
    else:
        assert all(words in fault for words in ("episode ", ".mp4", f"observation.images.{camera}: ", "on_bad_episode"))
        assert not found.usable
        if len(wrong) == len(stated):
            with pytest.raises(ValueError, match="no episode is left"):
                opened_without(folder)
            return
        left = opened_without(folder)
        assert sorted({*left.numbers, *wrong}) == list(range(len(stated)))
        assert not set(left.numbers) & set(wrong)
        assert [problem.episode for problem in found.problems] == [name for name, _ in left.skipped]
        check_frames(left)


def test_a_merged_table_names_the_file_that_nobody_has(good, tmp_path_factory):
    folder = spoilt(good, tmp_path_factory, lambda rows: merged(rows, "top"))
    fault = fault_of(folder)
    assert "file-001.mp4: episode 0: observation.images.top: from_timestamp, to_timestamp: " in fault
    assert "overlaps that of episode 2, 0 s to 0.9 s" in fault
    assert "No episode has frames of videos/observation.images.top/chunk-000/file-000.mp4." in fault
    assert opened_without(folder).numbers == [2, 3, 4]


def test_cameras_that_are_not_read_do_not_matter(good, tmp_path_factory):
    folder = spoilt(good, tmp_path_factory, lambda rows: merged(rows, "top"))
    assert fault_of(folder, cameras=["wrist"]) is None
    assert LeRobotSource(folder, cameras=()).num_episodes == len(LENGTHS)


def test_a_video_of_no_episode_is_an_error_of_the_whole_set(good, tmp_path_factory):
    folder = spoilt(good, tmp_path_factory, lambda rows: None)
    shutil.copy(mp4(folder, "top", 1), mp4(folder, "top", 2))
    assert "file-002.mp4: observation.images.top: no episode of the table has its frames" in fault_of(folder)
    with pytest.raises(ValueError, match="no episode of the table has its frames"):
        opened_without(folder)
    assert "no episode of the table has its frames" in inspect(folder).problems[0].text
    assert fault_of(folder, cameras=["wrist"]) is None


def test_a_video_that_is_missing(good, tmp_path_factory):
    folder = spoilt(good, tmp_path_factory, lambda rows: None)
    mp4(folder, "wrist", 2).unlink()
    assert "file-002.mp4: episode 4: observation.images.wrist: no such video file" in fault_of(folder)
    assert opened_without(folder).numbers == [0, 1, 2, 3]


@pytest.mark.parametrize("frames", [-2, 3])
def test_a_file_with_other_numbers_of_frames(good, tmp_path_factory, frames):
    """The table alone is right, so headers tell, before pictures are read."""
    folder = spoilt(good, tmp_path_factory, lambda rows: None)
    write_mp4(mp4(folder, "wrist", 2), [level(4)] * (LENGTHS[4] + frames))
    fault = fault_of(folder)
    assert LeRobotSource(folder).num_episodes == len(LENGTHS)
    assert "file-002.mp4: episode 4: observation.images.wrist: from_timestamp, to_timestamp: " in fault
    assert f"the file has {LENGTHS[4] + frames} frames, but the episodes that the table puts into it have 6" in fault
    assert opened_without(folder).numbers == [0, 1, 2, 3]
    assert [problem.episode for problem in inspect(folder).problems] == ["episode_000004"]


def in_v21(good, folder):
    """The set as v2.1 has it: a parquet file and, per camera, an mp4 an episode."""
    info = json.loads((good / "meta/info.json").read_text()) | {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    table, first = pq.ParquetFile(good / "data/chunk-000/file-000.parquet").read(), 0
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    for number, length in enumerate(LENGTHS):
        pq.write_table(
            table.slice(first, length), folder / info["data_path"].format(episode_chunk=0, episode_index=number)
        )
        first += length
        for camera in CAMERAS:
            names = {"episode_chunk": 0, "episode_index": number, "video_key": f"observation.images.{camera}"}
            write_mp4(folder / info["video_path"].format(**names), [level(number)] * length)
    episodes = [{"episode_index": number, "length": length} for number, length in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "lift"}))
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("frames", [-2, 2])
def test_a_video_of_an_episode_has_its_frames(good, tmp_path, frames):
    folder = in_v21(good, tmp_path / "set")
    assert fault_of(folder) is None
    check_frames(LeRobotSource(folder))
    path = folder / "videos/chunk-000/observation.images.top/episode_000001.mp4"
    write_mp4(path, [level(1)] * (LENGTHS[1] + frames))
    assert f"{path}: episode 1: observation.images.top: " in fault_of(folder)
    assert f"the file has {LENGTHS[1] + frames} frames" in fault_of(folder)
    left = opened_without(folder)
    assert left.numbers == [0, 2, 3, 4]
    check_frames(left)
    assert [problem.episode for problem in inspect(folder).problems] == ["episode_000001"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_timestamps_count_from_the_beginning_of_an_episode(good, tmp_path, version):
    folder = in_v21(good, tmp_path / "set") if version == "v2.1" else shutil.copytree(good, tmp_path / "set")
    path = next((folder / "data").rglob("*.parquet"))
    table = pq.ParquetFile(path).read()
    at = table.schema.get_field_index("timestamp")
    number = table["episode_index"][0].as_py()
    shift = np.where(table["episode_index"].to_numpy() == number, 2 / FPS, 0)
    times = pa.array((table["timestamp"].to_numpy() + shift).astype(np.float32))
    pq.write_table(table.set_column(at, "timestamp", times), path)
    assert f"episode {number}: timestamp: expected 0 s in frame 0" in fault_of(folder)
    assert number not in opened_without(folder).numbers
    assert fault_of(folder, cameras=()) is None


@pytest.mark.parametrize(("changes", "left"), [({1: 3}, [0, 3, 4]), ({1: 3, 2: 3}, [0, 1, 4])])
def test_ranges_of_rows_are_a_partition(good, tmp_path, changes, left):
    """Rows and table agree with one another, and yet two episodes have the same numbers, or none has some."""
    folder = shutil.copytree(good, tmp_path / "set")
    rows = pq.ParquetFile(folder / TABLE).read().to_pylist()
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.ParquetFile(path).read()
    indices, episodes = table["index"].to_numpy().copy(), table["episode_index"].to_numpy()
    for number, shift in changes.items():
        for name in ("dataset_from_index", "dataset_to_index"):
            rows[number][name] += shift
        indices[episodes == number] += shift
    write_rows(folder, rows)
    pq.write_table(table.set_column(table.schema.get_field_index("index"), "index", pa.array(indices)), path)
    assert "dataset_from_index, dataset_to_index: " in fault_of(folder)
    assert opened_without(folder).numbers == left


@pytest.mark.parametrize("frames", [-1, 1])
def test_no_tolerance_covers_a_frame(good, tmp_path_factory, frames):
    folder = spoilt(good, tmp_path_factory, lambda rows: moved(rows, "top", 3, 0, frames))
    assert "overlaps that of episode" in fault_of(folder, tolerance_s=0.3)
    assert LeRobotSource(good, tolerance_s=0.3).num_episodes == len(LENGTHS)


def test_a_selection_answers_for_its_own_episodes(good, tmp_path_factory):
    folder = spoilt(good, tmp_path_factory, lambda rows: moved(rows, "top", 3, 0, 1))
    assert fault_of(folder, episodes=[1, 0, 2]) is None
    assert "episode 4: " in fault_of(folder, episodes=[1, 4])
