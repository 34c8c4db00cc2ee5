"""Frames of an mp4 by their number, for recordings in which step t is frame t, regardless of timestamps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.data.formats import video
from acrlpd.data.formats.layouts.columns import Pictures

TOLERANCE_S = 1e-6  # frames are requested at exactly the times at which they were found


@dataclasses.dataclass(frozen=True)
class Video(Pictures):
    """Pictures of which number t is frame t of a video, in presentation order."""

    readers: video.VideoReaders = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, path: Path, label: str, readers: video.VideoReaders) -> Video:
        """Count the frames and decode only the first; raise ``PictureError`` unless it is 8-bit colour."""
        try:
            times = _frame_times(path)
            if not len(times):
                raise video.VideoError("the video has no frame")
            first = readers.frames(path, times[:1], TOLERANCE_S, (-np.inf, np.inf))
        except video.VideoPictureError:
            raise
        except video.VideoError as error:
            raise _named(path, label, error) from error
        return cls(path, label, len(times), first.shape[1:], readers=readers)

    def _encoded(self) -> list[Any]:
        return ["video", str(self.path), self.label, self.num_stored, self.row_shape]

    @classmethod
    def decode(cls, encoded: list[Any], readers: video.VideoReaders) -> Video:
        """Return what ``_encoded`` described."""
        _, path, label, num_frames, row_shape = encoded
        return cls(Path(path), label, num_frames, tuple(row_shape), readers=readers)

    def _read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        times = _frame_times(self.path)[start:stop]
        if not len(times):
            return np.empty((0, *self.row_shape), np.uint8)
        try:
            return self.readers.frames(self.path, times, TOLERANCE_S, (-np.inf, np.inf))
        except video.VideoError as error:
            raise _named(self.path, self.label, error) from error


def _frame_times(path: Path) -> Float[np.ndarray, " n"]:
    if not path.is_file():
        raise video.VideoError("no such video file")
    status = path.stat()
    return _times_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _times_of(path: Path, *state: int) -> Float[np.ndarray, " n"]:
    """Read the frame times, cached for the videos in use: a whole data set would take hundreds of megabytes.

    ``state`` (size, time and inode) is part of the cache key, in case another file takes the place of this one.
    """
    return video.frame_times(path)


def _named(path: Path, label: str, error: video.VideoError) -> ValueError:
    return ValueError(f"{path}: {label}: {error}")
