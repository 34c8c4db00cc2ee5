"""A cache of decoded frames at the model's resolution, made once and read from files of its own.

Decoding and resizing a video frame takes milliseconds, reading it from a record microseconds. A record holds the frames
of one camera in one episode, ``<folder>/<height>x<width>/<camera>/<episode>-<state>-<stretch>.npy``, uint8 [t h w 3].
The state is a hash of size and time of the file with the frames, so a changed file is decoded again; after swapping
files of equal size and time, delete the folder. Records are written whole or not at all, and a build that was stopped
continues with the missing records. Use one folder per data set; different selections of its episodes share their
records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from acrlpd import fields, files
from acrlpd.data.formats.layouts.columns import StoredRows
from acrlpd.data.store import flat
from acrlpd.data.store.episodes import IMAGE_PREFIX, EpisodeSource
from acrlpd.fields import PositiveInt
from acrlpd.pictures import resize_with_pad

logger = logging.getLogger(__name__)

BLOCK = 64  # frames decoded at a time
FRAMES = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FrameOrigin:
    """The place of the frames of one camera in one episode."""

    name: str  # name of the episode, independent of the selection; usable in a file name
    file: Path
    stretch: str  # part of the file


@runtime_checkable
class FrameSource(EpisodeSource, Protocol):
    """An ``EpisodeSource`` whose pictures are worth caching."""

    def frame_origin(self, index: int, camera: str) -> FrameOrigin: ...


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """Records under ``folder``, of frames resized to ``height`` x ``width`` by ``pictures.resize_with_pad``."""

    folder: Path
    height: PositiveInt = 224
    width: PositiveInt = 224

    def __post_init__(self):
        fields.check(self)

    def build(self, source: FrameSource) -> None:
        """Make the missing records; their size is logged first.

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
            files.remove_abandoned(self._camera_folder(camera))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the frame cache needs {needed / 1e6:.1f} MB more, and {free / 1e6:.1f} MB are free. "
                "Choose another folder, fewer cameras or a lower resolution."
            )
        for index, camera in missing:
            self._write(source, index, camera)

    def total_bytes(self, source: FrameSource) -> int:
        """Return the disk size of all records of ``source``."""
        return len(source.cameras) * sum(self._record_bytes(length) for length in source.lengths.tolist())

    def missing(self, source: FrameSource) -> list[tuple[int, str]]:
        """Return each (episode, camera) without a complete record, in the order of cameras, then of episodes."""
        return [
            (index, camera)
            for camera in source.cameras
            for index, length in enumerate(source.lengths.tolist())
            if not self._is_whole(self.record_path(camera, source.frame_origin(index, camera)), length)
        ]

    def read(
        self, camera: str, origin: FrameOrigin, length: int, start: int, stop: int
    ) -> UInt8[np.ndarray, "t h w 3"] | None:
        """Read frames ``start`` to ``stop`` of an episode of ``length`` frames; None if there is no record."""
        path, shape = self.record_path(camera, origin), self._shape(length)
        if not path.is_file():
            return None
        if not self._is_whole(path, length):
            raise ValueError(
                f"{path}: the record is damaged or of another size: expected uint8 {shape}. Delete the file, or have "
                "it made anew with `acrlpd data cache`."
            )
        return StoredRows(path, "", camera, shape, FRAMES, flat.HEADER_BYTES).read(start, stop)

    def _is_whole(self, path: Path, length: int) -> bool:
        return path.is_file() and flat.has_form(path, self._shape(length), FRAMES)

    def resize(self, frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """Resize frames as in a record, so that frames have one size whether they are cached or not."""
        if frames.shape[1:3] == (self.height, self.width):
            return frames
        return resize_with_pad(frames, self.height, self.width)

    def record_path(self, camera: str, origin: FrameOrigin) -> Path:
        """Return the record's file, which may not exist."""
        status = origin.file.stat()
        # No inode or change time: records take hours to make, and must stay valid for a copy of the data set.
        state = _digest(f"{status.st_size}:{status.st_mtime_ns}")
        return self._camera_folder(camera) / f"{origin.name}-{state}-{_digest(origin.stretch)}.npy"

    def _camera_folder(self, camera: str) -> Path:
        return files.inside(self.folder / f"{self.height}x{self.width}", camera, f"{self.folder}: the name of a camera")

    def _shape(self, length: int) -> tuple[int, int, int, int]:
        return length, self.height, self.width, 3

    def _record_bytes(self, length: int) -> int:
        return length * self.height * self.width * 3 + flat.HEADER_BYTES

    def _write(self, source: FrameSource, index: int, camera: str) -> None:
        origin, length = source.frame_origin(index, camera), int(source.lengths[index])
        path = self.record_path(camera, origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        # not through a mapping: a full disk would then kill the process
        with files.written_whole(path) as temporary, temporary.open("wb") as record:
            record.write(flat.header(self._shape(length), FRAMES))
            for start in range(0, length, BLOCK):
                stop = min(start + BLOCK, length)
                frames = self.resize(source.window(index, IMAGE_PREFIX + camera, start, stop))
                record.write(np.ascontiguousarray(frames).data)
        state = path.stem.removeprefix(f"{origin.name}-").partition("-")[0]
        for other in path.parent.glob(f"{origin.name}-*.npy"):  # also matches names that begin with this one
            found = re.fullmatch(r"([0-9a-f]+)-[0-9a-f]+", other.stem.removeprefix(f"{origin.name}-"))
            if found is not None and found[1] != state:  # from an earlier state of the file
                other.unlink(missing_ok=True)  # another process may have removed it


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
