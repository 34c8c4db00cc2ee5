"""Decoded frames at the model's resolution, made once and read from memory-mapped files.

Decoding a video and resizing its frames costs milliseconds a frame, reading a record microseconds. A record is the
frames of one camera in one episode, ``<folder>/<height>x<width>/<camera>/<episode>-<key>.npy``, uint8 [t h w 3]. Its
key is made from size and time of the file that the frames came from, so a changed file is decoded anew. Records are
written whole or not at all; a build that was stopped goes on with the records that are missing. Use one folder for each
data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from acrlpd.data.episodes import IMAGE_PREFIX, EpisodeSource
from acrlpd.data.layouts.columns import Rows
from acrlpd.data.layouts.own import sync
from acrlpd.data.transforms import resize_with_pad

logger = logging.getLogger(__name__)

BLOCK = 64  # frames decoded at a time
HEADER_BYTES = 128  # of a npy file of this form


@dataclasses.dataclass(frozen=True)
class FrameOrigin:
    """Where the frames of one camera in one episode lie."""

    name: str  # of the episode, good for a file name
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
        path = self.record_path(camera, origin)
        if not path.is_file():
            return None
        try:
            record = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: the record is damaged ({error}). Delete the file.") from error
        expected = (length, self.height, self.width, 3)
        if record.shape != expected or record.dtype != np.uint8:
            raise ValueError(
                f"{path}: expected a record of uint8 {expected}, found {record.dtype} {record.shape}. Delete the file."
            )
        return np.array(record[start:stop])

    def rows(self, camera: str, origin: FrameOrigin, length: int) -> Rows | None:
        """Where a record's frames lie in its file, to be mapped; None where there is no record of this form."""
        path = self.record_path(camera, origin)
        if not path.is_file() or path.stat().st_size != self._record_bytes(length):
            return None
        return Rows(path, "", camera, (length, self.height, self.width, 3), np.dtype(np.uint8), HEADER_BYTES)

    def resize(self, frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """As a record would hold them, so that a source's frames have one size whether or not they are cached."""
        if frames.shape[1:3] == (self.height, self.width):
            return frames
        return resize_with_pad(frames, self.height, self.width)

    def record_path(self, camera: str, origin: FrameOrigin) -> Path:
        """The record's file, there or not."""
        status = origin.file.stat()
        text = f"{status.st_size}:{status.st_mtime_ns}:{origin.stretch}"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{self.height}x{self.width}" / camera / f"{origin.name}-{key}.npy"

    def _record_bytes(self, length: int) -> int:
        return length * self.height * self.width * 3 + HEADER_BYTES

    def _write(self, source: FrameSource, index: int, camera: str) -> None:
        origin, length = source.frame_origin(index, camera), int(source.lengths[index])
        path = self.record_path(camera, origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            shape = (length, self.height, self.width, 3)
            record = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            for start in range(0, length, BLOCK):
                stop = min(start + BLOCK, length)
                record[start:stop] = self.resize(source.window(index, IMAGE_PREFIX + camera, start, stop))
            record.flush()
            del record
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for stale in path.parent.glob(f"{origin.name}-*.npy"):  # of an earlier state of the file
            if stale != path:
                stale.unlink()
