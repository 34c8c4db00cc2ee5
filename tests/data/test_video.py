"""Frames by presentation time, in a file with B-frames and key frames far apart."""

import av
import numpy as np
import pytest

from acrlpd.data.formats import video

FPS = 25
NUM_FRAMES = 60
TOLERANCE = 1e-4


def level(frame):
    """Brightness of a frame: no two within 20 frames of each other are close."""
    return 20 + 10 * (frame % 20)


def write_mp4(path, levels, *, fps=FPS, size=32, group=24):
    with av.open(str(path), "w") as container:
        options = {"g": str(group), "bf": "3", "crf": "5", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for value in levels:
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_mp4(tmp_path_factory.mktemp("video") / "clip.mp4", [level(frame) for frame in range(NUM_FRAMES)])


def assert_frames(pictures, frames):
    expected = [level(frame) for frame in frames]
    np.testing.assert_allclose(pictures.mean(axis=(1, 2, 3)), expected, atol=3)


def test_the_file_has_b_frames(mp4):
    with av.open(str(mp4)) as container:
        shown = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert shown != sorted(shown)


@pytest.mark.parametrize("wanted", [[0], [NUM_FRAMES - 1], [23, 24, 25], [7, 8, 30, 59], [5, 5, 6]])
def test_frames_by_time(mp4, wanted):
    assert_frames(video.VideoReader(mp4).frames(np.array(wanted) / FPS, TOLERANCE), wanted)


def test_any_order_of_windows(mp4):
    reader = video.VideoReader(mp4)
    for start in np.random.default_rng(0).integers(0, NUM_FRAMES - 3, size=40).tolist():
        frames = np.arange(start, start + 3)
        assert_frames(reader.frames(frames / FPS, TOLERANCE), frames)


def test_windows_that_follow_one_another_seek_once(mp4, monkeypatch):
    reader = video.VideoReader(mp4)
    seeks = []
    seek = reader._seek
    monkeypatch.setattr(reader, "_seek", lambda *args: (seeks.append(args), seek(*args)))
    for start in range(0, NUM_FRAMES, 10):
        frames = np.arange(start, start + 10)
        assert_frames(reader.frames(frames / FPS, TOLERANCE), frames)
    assert len(seeks) == 1
    reader.frames(np.array([0.0]), TOLERANCE)
    assert len(seeks) == 2


def test_rounding_of_times_is_forgiven(mp4):
    frames = np.arange(NUM_FRAMES)
    times = (frames / FPS).astype(np.float32).astype(np.float64)
    assert_frames(video.VideoReader(mp4).frames(times, TOLERANCE), frames)


@pytest.mark.parametrize("time", [0.5 / FPS, 10.1 / FPS, NUM_FRAMES / FPS, 100.0])
def test_no_neighbour_is_returned(mp4, time):
    with pytest.raises(video.VideoError, match=r"no video frame at .* nearest"):
        video.VideoReader(mp4).frames(np.array([time]), TOLERANCE)


def test_an_error_does_not_spoil_the_reader(mp4):
    reader = video.VideoReader(mp4)
    with pytest.raises(video.VideoError):
        reader.frames(np.array([100.0]), TOLERANCE)
    assert_frames(reader.frames(np.array([0.4, 0.44]), TOLERANCE), [10, 11])


@pytest.mark.parametrize(("start", "stop", "wanted"), [(0.4, 0.8, 9), (0.4, 0.8, 20), (0.0, 0.04, 1)])
def test_frames_outside_the_span_are_refused(mp4, start, stop, wanted):
    with pytest.raises(video.VideoError, match="outside the episode's stretch"):
        video.VideoReader(mp4).frames(np.array([wanted / FPS]), TOLERANCE, (start, stop))


def test_the_span_is_half_open(mp4):
    assert_frames(video.VideoReader(mp4).frames(np.array([0.4, 0.76]), TOLERANCE, (0.4, 0.8)), [10, 19])


def test_frame_times(mp4):
    np.testing.assert_allclose(video.frame_times(mp4), np.arange(NUM_FRAMES) / FPS, atol=1e-6)


def test_a_file_with_its_table_at_the_end_cut_short_cannot_be_opened(mp4, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(mp4.read_bytes()[:-200])
    with pytest.raises(video.VideoError, match="cannot be opened"):
        video.frame_times(cut)


def test_readers_keep_few_files_open(mp4, monkeypatch):
    monkeypatch.setattr(video, "MAX_OPEN_FILES", 1)
    readers = video.VideoReaders()
    for frame in (3, 4):
        assert_frames(readers.frames(mp4, np.array([frame / FPS]), TOLERANCE, (0.0, np.inf)), [frame])
    other = mp4.with_name("other.mp4")
    other.write_bytes(mp4.read_bytes())
    assert_frames(readers.frames(other, np.array([0.0]), TOLERANCE, (0.0, np.inf)), [0])
    assert readers._open.cache_info().currsize == 1


def test_missing_file(tmp_path):
    with pytest.raises(video.VideoError, match="no such video file"):
        video.VideoReader(tmp_path / "none.mp4")
