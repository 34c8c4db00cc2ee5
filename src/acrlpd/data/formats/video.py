"""Frames of video files by presentation time: the frame at the requested time, or an error.

Frames are found by the time at which they are shown, not by their place in the file: with B-frames the orders differ. A
reader keeps its file open and continues where it stopped, so consecutive windows cost only one seek.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.data.formats.pictures import PictureError
from acrlpd.files import MAX_PIXELS, check_memory

READ_ON_S = 0.2  # up to this far ahead, decode on instead of seeking
MAX_OPEN_FILES = 16
# FFmpeg would also follow playlists to other files and addresses
LIMITS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}


class VideoError(ValueError):
    """An error that says what is wrong with a video; the caller adds file, episode and camera."""


class VideoPictureError(VideoError, PictureError):
    """An error with the reason why the pictures of a video are not 8-bit colour."""


class VideoReader:
    """A reader of one open video file. Several threads may share it; they take turns."""

    def __init__(self, path: Path):
        self._av = import_av()
        self._lock = threading.Lock()
        self._container = _open(self._av, path)
        self._stream = self._container.streams.video[0]
        _check_colour(self._stream)
        self._frames: Iterator[Any] = iter(())
        self._before: Any = None  # the last two decoded frames; the last requested time lies between them
        self._current: Any = None

    def frames(
        self,
        times_s: Float[np.ndarray, " t"],
        tolerance_s: float,
        span_s: tuple[float, float] = (0.0, np.inf),
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Return the frames shown at ``times_s`` (ascending), as RGB.

        Raises:
            VideoError: a time has no frame within ``tolerance_s``, or the frame lies outside the half-open ``span_s``.
        """
        check_memory("frames", len(times_s) * self._stream.height * self._stream.width * 3, VideoError)
        out = np.empty((len(times_s), self._stream.height, self._stream.width, 3), np.uint8)
        with self._lock:
            try:
                for picture, time in zip(out, times_s.tolist(), strict=True):
                    self._decode(time, tolerance_s, span_s, picture)
            except self._av.FFmpegError as error:
                self._before = self._current = None
                raise VideoError(
                    f"the video does not decode ({getattr(error, 'strerror', error)}); the mp4 is damaged"
                ) from error
        return out

    def _decode(self, time: float, tolerance_s: float, span_s: tuple[float, float], picture: np.ndarray) -> None:
        """Decode the frame at ``time`` into ``picture``."""
        frame = self._nearest(time, tolerance_s)
        found = np.empty(0) if frame is None else np.array([frame.time])
        check_times(found, np.array([time]), tolerance_s, span_s)
        if frame.is_corrupt:
            raise VideoError(f"the video frame at {time:.6f} s is damaged and does not decode completely")
        if (frame.height, frame.width) != picture.shape[:2]:
            raise VideoError(f"the video frame at {time:.6f} s has another size than the video says")
        picture[:] = frame.to_ndarray(format="rgb24")

    def _nearest(self, time: float, tolerance_s: float) -> Any:
        """Return the frame shown nearest to ``time``; None if the file ends before there is any."""
        if not self._can_read_on(time, tolerance_s):
            self._seek(time, tolerance_s)
        while self._current is None or self._current.time < time:
            following = next(self._frames, None)
            if following is None:
                break
            self._before, self._current = self._current, following
        near = [frame for frame in (self._before, self._current) if frame is not None]
        return min(near, key=lambda frame: abs(frame.time - time), default=None)

    def _can_read_on(self, time: float, tolerance_s: float) -> bool:
        if self._current is None:
            return False
        earliest = self._current if self._before is None else self._before
        return earliest.time - tolerance_s <= time <= self._current.time + READ_ON_S

    def _seek(self, time: float, tolerance_s: float) -> None:
        """Seek to a key frame shown no later than ``time``. Containers are searched by decoding time, so the first one
        found may be shown later; then the search goes further back."""
        self._before = self._current = None
        base, start = self._stream.time_base, self._stream.start_time or 0
        back_s = 0.0
        while True:
            target = max(int((time - tolerance_s - back_s) / base), start)
            self._container.seek(target, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets, None)
            if first is None:
                self._frames = iter(())
                return
            if target == start or (first.pts is not None and first.pts * base <= time + tolerance_s):
                self._frames = (frame for packet in itertools.chain([first], packets) for frame in packet.decode())
                return
            back_s = 2 * back_s + 1


class VideoReaders:
    """The last ``MAX_OPEN_FILES`` readers used, by file. Older ones close when no thread uses them any more."""

    def __init__(self) -> None:
        self._open = functools.lru_cache(MAX_OPEN_FILES)(VideoReader)

    def __reduce__(self) -> tuple[type[VideoReaders], tuple[()]]:
        """Pickle without open files: a copy in another process opens its own."""
        return VideoReaders, ()

    def frames(
        self, path: Path, times_s: Float[np.ndarray, " t"], tolerance_s: float, span_s: tuple[float, float]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Return frames of a file, see ``VideoReader.frames``."""
        return self._open(path).frames(times_s, tolerance_s, span_s)


@dataclasses.dataclass(frozen=True)
class Outline:
    """The content of a video file's header."""

    size: tuple[int, int]  # height, width
    num_frames: int


def outline(path: Path) -> Outline:
    """Read a file's header; if it does not have the number of frames, count packets. Nothing is decoded."""
    container = _open(import_av(), path)
    try:
        stream = container.streams.video[0]
        size, num_frames = (stream.height, stream.width), stream.frames
    finally:
        container.close()
    return Outline(size, num_frames or len(frame_times(path)))


def check_colour(path: Path) -> None:
    """Raise ``VideoPictureError`` unless a file's header says 8-bit colour or grey."""
    container = _open(import_av(), path)
    try:
        _check_colour(container.streams.video[0])
    finally:
        container.close()


def _check_colour(stream: Any) -> None:
    """Raise unless the format is 8-bit. Depth is grey of 10 to 16 bits, of which RGB would keep only the highest 8."""
    layout = stream.format
    if layout is not None and any(component.bits != 8 or component.is_alpha for component in layout.components):
        raise VideoPictureError(f"its pictures are {layout.name}, expected 8-bit colour")


def frame_times(path: Path) -> Float[np.ndarray, " n"]:
    """Return the presentation times of the frames with complete data, ascending, in seconds. Nothing is decoded.

    In a truncated file these are the frames before the cut.
    """
    av = import_av()
    container = _open(av, path)
    ticks = []
    try:
        stream = container.streams.video[0]
        ticks = [packet.pts for packet in _whole_packets(av, container, stream)]
        return np.sort(np.array(ticks, np.float64)) * float(stream.time_base)
    finally:
        container.close()


def check_times(
    found_s: Float[np.ndarray, " n"],
    wanted_s: Float[np.ndarray, " t"],
    tolerance_s: float,
    span_s: tuple[float, float],
) -> None:
    """Raise unless every wanted time has a frame among ``found_s`` (ascending), inside the half-open span."""
    if len(found_s) == 0:
        raise VideoError(f"no frame at {wanted_s[0]:.6f} s: the video ends before it")
    after = np.clip(np.searchsorted(found_s, wanted_s), 1, max(len(found_s) - 1, 1))
    left, right = found_s[after - 1], found_s[np.minimum(after, len(found_s) - 1)]
    nearest = np.where(wanted_s - left <= right - wanted_s, left, right)
    far = np.abs(nearest - wanted_s) > tolerance_s
    if far.any():
        first = int(np.argmax(far))
        raise VideoError(
            f"no video frame at {wanted_s[first]:.6f} s: the nearest one lies at {nearest[first]:.6f} s, farther than "
            f"the tolerance of {tolerance_s:g} s. The mp4 is cut short, or its timestamps do not fit the table."
        )
    start, stop = span_s
    outside = (nearest < start - tolerance_s) | (nearest >= stop - tolerance_s)
    if outside.any():
        raise VideoError(
            f"the video frame at {nearest[int(np.argmax(outside))]:.6f} s lies outside the episode's stretch of the "
            f"mp4, from_timestamp {start:.6f} to to_timestamp {stop:.6f} s"
        )


def _whole_packets(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):  # data behind the damage counts as missing
            return
        if packet.pts is not None and not packet.is_corrupt:
            yield packet


def _open(av: Any, path: Path) -> Any:
    if not path.is_file():
        raise VideoError("no such video file")
    try:
        container = av.open(str(path), options=LIMITS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"the video cannot be opened ({error.strerror}); the mp4 is truncated or damaged") from error
    if not container.streams.video:
        container.close()
        raise VideoError("the file holds no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise VideoError("the video has an unknown codec; the mp4 is damaged, or FFmpeg lacks the codec")
    if not 0 < stream.height * stream.width <= MAX_PIXELS:
        container.close()
        raise VideoError(f"the video claims {stream.width}x{stream.height} pixels: it is damaged or malicious")
    return container


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'acrlpd[lerobot]'") from error
    return av
