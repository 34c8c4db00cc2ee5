"""The numbers of all episodes of a data set as one flat array per key, in memory or in a file of our own.

A data set's own files are never mapped into memory: one that shrinks while it is mapped kills the process. What is
mapped here is a copy, made once when the data set is opened, which the kernel may drop from memory and read again.
"""

from __future__ import annotations

import functools
import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Shaped

MEMORY_BYTES = 64 << 20  # a key of at most this size stays in memory
HEADER_BYTES = 128  # size of the header of the .npy files written here


class Flat(Mapping[str, np.ndarray]):
    """The rows of all episodes by key: ``state``, ``actions``, ``rewards`` and ``terminals``; read-only if mapped.

    A copy, as in another process, has the keys without the rows: worker processes read pictures only.
    """

    def __init__(self, rows: Mapping[str, np.ndarray | None]):
        self._rows = rows  # None in a copy

    def __reduce__(self) -> tuple[type[Flat], tuple[dict[str, None]]]:
        return Flat, (dict.fromkeys(self._rows),)

    def __getitem__(self, key: str) -> np.ndarray:
        rows = self._rows[key]
        if rows is None:
            raise ValueError(f"{key}: a copy of a data set, as in another process, has no numbers: open the set there")
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def window(self, key: str, first: int, stop: int) -> np.ndarray:
        """Return a copy of some rows."""
        return np.array(self[key][first:stop])


class FlatRows:
    """The rows of one key, appended episode by episode: in memory up to ``memory_bytes``, then in a temporary file.

    The file is in ``folder`` if files can be made there, else in the system's folder for temporary ones. It has no
    name, so nothing of it remains when the process ends.
    """

    def __init__(self, folder: Path | None = None, *, memory_bytes: int = MEMORY_BYTES):
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._file: IO[bytes] = io.BytesIO()
        self._blocks: list[tuple[int, int, tuple[int, ...]]] = []  # first byte, size and shape of each episode's rows
        self._dtype = np.dtype(np.float32)
        self._nbytes = 0

    def append(self, rows: Shaped[np.ndarray, "t *shape"]) -> None:
        """Add the rows of the next episode.

        Raises:
            OSError: there is no room for them.
        """
        self._dtype = rows.dtype
        self._blocks.append((self._nbytes, rows.nbytes, rows.shape))
        self._nbytes += rows.nbytes
        try:
            if self._nbytes > self._memory_bytes and isinstance(self._file, io.BytesIO):
                self._file = _moved_to_disk(self._file, self._folder)
            self._file.write(rows.tobytes())
        except OSError as error:
            raise OSError(error.errno, f"no room for a copy of the data set's numbers: {error.strerror}") from error

    def keep(self, episodes: Iterable[int]) -> None:
        """Keep only these episodes, in ascending order of their positions."""
        blocks, end = [], 0
        for index in episodes:
            start, nbytes, shape = self._blocks[index]
            if start > end:
                self._file.seek(start)
                content = self._file.read(nbytes)
                self._file.seek(end)
                self._file.write(content)
            blocks.append((end, nbytes, shape))
            end += nbytes
        self._blocks, self._nbytes = blocks, end

    def result(self) -> Shaped[np.ndarray, "r *shape"]:
        """Return all rows, which must have one shape, and close: an array in memory, or a ``numpy.memmap``."""
        shape = (sum(shape[0] for _, _, shape in self._blocks), *self._blocks[0][2][1:])
        with self._file as file:
            file.seek(0)
            if self._nbytes <= self._memory_bytes:
                return np.frombuffer(file.read(self._nbytes), self._dtype).reshape(shape)
            return np.memmap(file, self._dtype, "r", shape=shape)  # it needs no open file


def _moved_to_disk(content: io.BytesIO, folder: Path | None) -> IO[bytes]:
    """Return a nameless file with this content, in ``folder`` if files can be made there."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it stays open
    except OSError:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content.getbuffer())
    return file


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
