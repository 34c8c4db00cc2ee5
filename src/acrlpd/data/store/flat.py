"""The numbers of all episodes of a data set as one flat array per key, in memory or in a file of our own.

A data set's own files are never mapped into memory: one that shrinks while it is mapped kills the process. What is
mapped here is a copy, made once when the data set is opened, which the kernel may drop from memory and read again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Shaped

MEMORY_BYTES = 64 << 20  # a key of at most this size stays in memory
HEADER_BYTES = 128  # size of the header of the .npy files written here


class Flat(Mapping[str, np.ndarray]):
    """The rows of all episodes by key: ``state``, ``actions``, ``rewards`` and ``terminals``; read-only if mapped.

    A copy, such as one sent to another process, keeps the keys without the rows: worker processes read only pictures.
    """

    def __init__(self, rows: Mapping[str, np.ndarray | None]):
        self._rows = rows  # None in a copy

    def __reduce__(self) -> tuple[type[Flat], tuple[dict[str, None]]]:
        return Flat, (dict.fromkeys(self._rows),)

    def __getitem__(self, key: str) -> np.ndarray:
        rows = self._rows[key]
        if rows is None:
            raise ValueError(f"{key}: a data set sent to another process keeps no numbers: open it in that process")
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def window(self, key: str, first: int, stop: int) -> np.ndarray:
        """Return a copy of some rows."""
        return np.array(self[key][first:stop])


class _Block(NamedTuple):
    """The rows of one episode in a file."""

    start: int  # in bytes, as is the size
    nbytes: int
    shape: tuple[int, ...]
    dtype: np.dtype
    episode: str


class FlatRows:
    """The rows of one key, appended episode by episode: in memory up to ``memory_bytes``, then in a temporary file.

    The file is in ``folder`` if files can be made there, else in the system's folder for temporary ones. It has no
    name, so nothing of it remains when the process ends. All methods raise an OSError if there is no room for the rows.
    """

    def __init__(self, key: str, folder: Path | None = None, *, memory_bytes: int = MEMORY_BYTES):
        self._key = key
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._file: IO[bytes] = io.BytesIO()
        self._blocks: list[_Block] = []
        self._nbytes = 0

    def append(self, rows: Shaped[np.ndarray, "t *shape"], episode: str) -> None:
        """Add the rows of the next episode, which errors call ``episode``."""
        self._blocks.append(_Block(self._nbytes, rows.nbytes, rows.shape, rows.dtype, episode))
        self._nbytes += rows.nbytes
        with self._naming_the_place():
            if self._nbytes > self._memory_bytes and isinstance(self._file, io.BytesIO):
                self._file = self._moved_to_disk(self._file)
            self._file.write(rows.tobytes())

    def keep(self, episodes: Iterable[int]) -> None:
        """Keep only these episodes, in ascending order of their positions."""
        blocks, end = [], 0
        for index in episodes:
            block = self._blocks[index]
            if block.start > end:
                with self._naming_the_place():
                    self._file.seek(block.start)
                    content = self._file.read(block.nbytes)
                    self._file.seek(end)
                    self._file.write(content)
            blocks.append(block._replace(start=end))
            end += block.nbytes
        self._blocks, self._nbytes = blocks, end

    def result(self) -> Shaped[np.ndarray, "r *shape"]:
        """Return all rows and close: an array in memory, or a ``numpy.memmap``.

        Raises:
            ValueError: an episode's rows differ from the first one's in shape or dtype.
        """
        first = self._blocks[0]
        for block in self._blocks:
            if (block.shape[1:], block.dtype) != (first.shape[1:], first.dtype):
                raise ValueError(
                    f"{block.episode}: {self._key} has rows of {block.dtype} {block.shape[1:]}, expected {first.dtype} "
                    f"{first.shape[1:]} as in {first.episode}. Repair the episode, or leave it out."
                )
        shape = (sum(block.shape[0] for block in self._blocks), *first.shape[1:])
        with self._naming_the_place(), self._file as file:
            file.seek(0)
            if self._nbytes <= self._memory_bytes:
                return np.frombuffer(file.read(self._nbytes), first.dtype).reshape(shape)
            return np.memmap(file, first.dtype, "r", shape=shape)  # it needs no open file

    def _moved_to_disk(self, content: io.BytesIO) -> IO[bytes]:
        """Return a nameless file with this content, in the folder if files can be made there."""
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - it stays open
        except OSError:
            self._folder = None
            file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(content.getbuffer())
        return file

    @contextlib.contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self._folder or tempfile.tempdir or "the folder for temporary files"
            text = (
                f"{place}: cannot keep a copy of the data set's numbers ({self._key}): {error.strerror or error}. "
                "Set XDG_CACHE_HOME and TMPDIR to a folder with more room, or to one in memory such as /dev/shm"
            )
            raise OSError(error.errno, text) from error


def is_mapped(rows: object) -> bool:
    """Return whether rows lie in a file, rather than in memory."""
    return isinstance(rows, np.memmap)


def write(path: Path, rows: np.ndarray) -> None:
    """Write an array as an ``.npy`` file. Not through a mapping: a full disk would then kill the process."""
    with path.open("wb") as file:
        file.write(header(rows.shape, rows.dtype))
        np.ascontiguousarray(rows).tofile(file)


def open_mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Map a file that ``write`` made.

    Raises:
        ValueError: it has not exactly the size and the header that such an array gives it.
    """
    if not has_form(path, shape, dtype):
        raise ValueError(f"{path}: expected {dtype} {shape}, found a file of another size or header")
    return np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=shape)


def has_form(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Return whether a file has exactly the size and the header of such an array."""
    with path.open("rb", buffering=0) as file:
        is_whole = os.fstat(file.fileno()).st_size == HEADER_BYTES + math.prod(shape) * dtype.itemsize
        return is_whole and file.read(HEADER_BYTES) == header(shape, dtype)


@functools.lru_cache(maxsize=4096)
def header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
