"""Decoded frames at the model's resolution, made once and read from memory-mapped files.

Decoding a video and resizing its frames costs milliseconds a frame, reading a record microseconds. A record is the
frames of one camera in one episode, ``<folder>/<height>x<width>/<camera>/<episode>-<state>-<stretch>.npy``, uint8
[t h w 3]. The state is made from size and time of the file that the frames came from, so a changed file is decoded
anew; where files of equal size and time were swapped, delete the folder. Records are written whole or not at all; a
build that was stopped goes on with the records that are missing. Use one folder for each data set; selections of its
episodes share their records.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from acrlpd.data.episodes import IMAGE_PREFIX, EpisodeSource
from acrlpd.data.layouts.columns import Rows
from acrlpd.data.transforms import resize_with_pad
from acrlpd.files import remove_abandoned, temporary_path

logger = logging.getLogger(__name__)

BLOCK = 64  # frames decoded at a time
HEADER_BYTES = 128  # of a npy file of this form


@dataclasses.dataclass(frozen=True)
class FrameOrigin:
    """Where the frames of one camera in one episode lie."""

    name: str  # of the episode, whatever others are selected; good for a file name
    file: Path
    stretch: str  # which part of the file


@runtime_checkable
class FrameSource(EpisodeSource, Protocol):
    """Episodes whose pictures are worth caching."""

    def frame_origin(self, index: int, camera: str) -> FrameOrigin: ...


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """Records under ``folder``, of frames padded to ``height`` x ``width`` as ``transforms.resize_with_pad`` does."""

    folder: Path
    height: int = 224
    width: int = 224

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 pixel, got {getattr(self, name)}")

    def build(self, source: FrameSource) -> None:
        """Makes the records that are missing; their size is logged first.

        Raises:
            OSError: the disk has not enough room for them.
        """
        missing = self.missing(source)
        needed = sum(self._record_bytes(int(source.lengths[index])) for index, _ in missing)
        total = self.total_bytes(source)
        logger.info(
            "frame cache for %d frames of %s at %dx%d: %.1f MB in %s, of which %.1f MB are still to be written",
            *(int(source.lengths.sum()), ", ".join(source.cameras), self.height, self.width),
            *(total / 1e6, self.folder, needed / 1e6),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for camera in source.cameras:
            remove_abandoned(self._camera_folder(camera))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the frame cache needs {needed / 1e6:.1f} MB more, and {free / 1e6:.1f} MB are free. "
                "Choose another folder, fewer cameras or a lower resolution."
            )
        for index, camera in missing:
            self._write(source, index, camera)

    def total_bytes(self, source: FrameSource) -> int:
        """What all records of ``source`` take on the disk."""
        return len(source.cameras) * sum(self._record_bytes(length) for length in source.lengths.tolist())

    def missing(self, source: FrameSource) -> list[tuple[int, str]]:
        """(episode, camera) without a whole record. Cameras of an episode follow one another, as do those of a file."""
        return [
            (index, camera)
            for camera in source.cameras
            for index, length in enumerate(source.lengths.tolist())
            if self.rows(camera, source.frame_origin(index, camera), length) is None
        ]

    def read(
        self, camera: str, origin: FrameOrigin, length: int, start: int, stop: int
    ) -> UInt8[np.ndarray, "t h w 3"] | None:
        """Frames ``start`` to ``stop`` of an episode of ``length`` frames; None where there is no record."""
        rows = self.rows(camera, origin, length)
        if rows is not None:
            return rows.read(start, stop)
        path = self.record_path(camera, origin)
        if not path.is_file():
            return None
        raise ValueError(
            f"{path}: the record is damaged or of another size: expected uint8 {self._shape(length)}. Delete the file, "
            "or have it made anew with `acrlpd data cache`."
        )

    def rows(self, camera: str, origin: FrameOrigin, length: int) -> Rows | None:
        """Where a record's frames lie in its file, to be mapped; None where there is no record of this form."""
        path, shape = self.record_path(camera, origin), self._shape(length)
        if not path.is_file() or path.stat().st_size != self._record_bytes(length):
            return None
        with path.open("rb", buffering=0) as file:
            if file.read(HEADER_BYTES) != _header(shape):
                return None
        return Rows(path, "", camera, shape, np.dtype(np.uint8), HEADER_BYTES)

    def resize(self, frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """As a record would hold them, so that a source's frames have one size whether or not they are cached."""
        if frames.shape[1:3] == (self.height, self.width):
            return frames
        return resize_with_pad(frames, self.height, self.width)

    def record_path(self, camera: str, origin: FrameOrigin) -> Path:
        """The record's file, there or not."""
        status = origin.file.stat()
        # Not the inode or the time of change: records take hours to make, and hold for a copy of the data set too.
        state = _digest(f"{status.st_size}:{status.st_mtime_ns}")
        return self._camera_folder(camera) / f"{origin.name}-{state}-{_digest(origin.stretch)}.npy"

    def _camera_folder(self, camera: str) -> Path:
        return self.folder / f"{self.height}x{self.width}" / camera

    def _shape(self, length: int) -> tuple[int, int, int, int]:
        return length, self.height, self.width, 3

    def _record_bytes(self, length: int) -> int:
        return length * self.height * self.width * 3 + HEADER_BYTES

    def _write(self, source: FrameSource, index: int, camera: str) -> None:
        origin, length = source.frame_origin(index, camera), int(source.lengths[index])
        path = self.record_path(camera, origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            with temporary.open("wb") as record:  # not mapped: a disk that fills up meanwhile would end the process
                record.write(_header(self._shape(length)))
                for start in range(0, length, BLOCK):
                    stop = min(start + BLOCK, length)
                    frames = self.resize(source.window(index, IMAGE_PREFIX + camera, start, stop))
                    record.write(np.ascontiguousarray(frames).data)
                record.flush()
                os.fsync(record.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        state = path.stem.removeprefix(f"{origin.name}-").partition("-")[0]
        for other in path.parent.glob(f"{origin.name}-*.npy"):  # or of an episode whose name goes on like this
            found = re.fullmatch(r"([0-9a-f]+)-[0-9a-f]+", other.stem.removeprefix(f"{origin.name}-"))
            if found is not None and found[1] != state:  # of an earlier state of the file
                other.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _header(shape: tuple[int, int, int, int]) -> bytes:
    """What a record begins with."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
