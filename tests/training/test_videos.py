import numpy as np
import pytest

from acrlpd.training.videos import write_mp4


def test_a_video_has_every_frame_and_its_rate(tmp_path):
    av = pytest.importorskip("av")
    frames = np.repeat(np.arange(0, 240, 24, dtype=np.uint8), 32 * 48 * 3).reshape(10, 32, 48, 3)
    write_mp4(tmp_path / "videos" / "one.mp4", frames, fps=12.5)
    with av.open(str(tmp_path / "videos" / "one.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 12.5
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 8  # lossy
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["one.mp4"]


def test_an_odd_size_is_refused(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="even height and width"):
        write_mp4(tmp_path / "odd.mp4", np.zeros((1, 31, 32, 3), np.uint8), fps=10)
