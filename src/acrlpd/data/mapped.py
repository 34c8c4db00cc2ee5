"""Rows of all episodes read directly from their files, which are mapped into memory: nothing is loaded beforehand.

HDF5 stores a data set that is neither chunked nor compressed as one block of bytes, so the place of a row is computed,
and a batch is one fancy index over all files at once. The files are only in the kernel's page cache, which it frees
when memory is short.

A mapped file may be deleted, or replaced by another of the same name. If it is truncated in place, the next read past
the new end kills the process (SIGBUS): that is how mappings work.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from acrlpd.data.episodes import IMAGE_PREFIX
from acrlpd.data.layouts.columns import Column, Joined, Pictures
from acrlpd.data.layouts.columns import Rows as StoredRows

MAX_FILES = 32_000  # Linux allows 65,530 mappings per process, and other code needs some


@dataclasses.dataclass(frozen=True)
class MappedRows:
    """One key of all episodes, indexed like an array by row numbers or a slice."""

    parts: tuple[_Part, ...]  # concatenated along the last axis
    ends: Int[np.ndarray, " n"]  # row after the last one of each episode
    row_shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int = 0  # the kernel can free all of the memory

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.row_shape)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Int[np.ndarray, "*shape"] | slice) -> np.ndarray:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):  # a stray read could kill the process
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}")
        return self.take(wanted, np.searchsorted(self.ends, wanted, side="right"))

    def take(self, rows: Int[np.ndarray, "*shape"], episodes: Int[np.ndarray, "*#shape"]) -> np.ndarray:
        """Return rows of known episodes; the bounds are not checked again."""
        blocks = [part.take(rows, episodes) for part in self.parts]
        values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-1, dtype=self.dtype)
        return values.astype(self.dtype, copy=False).reshape(*rows.shape, *self.row_shape)

    def stretches(
        self, steps: Int[np.ndarray, "b h"], episodes: Int[np.ndarray, " b"]
    ) -> Shaped[np.ndarray, "b h *shape"]:
        blocks = [part.stretches(steps, episodes) for part in self.parts]
        values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-1, dtype=self.dtype)
        return values.astype(self.dtype, copy=False).reshape(*steps.shape, *self.row_shape)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One data set per episode. Row r of episode n begins at item ``origins[n] + r * width`` of the mapped files."""

    files: mmap.mmap
    dtype: np.dtype
    width: int
    origins: Int[np.ndarray, " n"]  # r counts over all episodes, so this may be negative

    def take(self, rows: Int[np.ndarray, "*shape"], episodes: Int[np.ndarray, "*#shape"]) -> np.ndarray:
        return self._items(1)[self.origins[episodes] + rows * self.width][..., None].view(self.dtype)

    def stretches(self, steps: Int[np.ndarray, "b h"], episodes: Int[np.ndarray, " b"]) -> np.ndarray:
        items = self._items(steps.shape[1])
        places = self.origins[episodes] + steps[:, 0] * self.width
        found = items[np.minimum(places, len(items) - 1)]  # a window may also pass the end of the last file
        return found[:, None].view(self.dtype).reshape(*steps.shape, self.width)

    def _items(self, num_rows: int) -> Shaped[np.ndarray, " m"]:
        """Return for each item of the files the bytes of the ``num_rows`` rows that would begin there.

        Numpy copies such opaque items at once, in a fraction of the time of gathering their numbers.
        """
        size = self.dtype.itemsize
        item = np.dtype((np.void, num_rows * self.width * size))
        return np.ndarray(((len(self.files) - item.itemsize) // size + 1,), item, self.files, strides=(size,))


def map_rows(episodes: Iterable[Mapping[str, Column | None]], lengths: Int[np.ndarray, " n"]) -> dict[str, MappedRows]:
    """Map the keys that the files of all episodes store as plain rows of one dtype; other keys are left out."""
    found: dict[str, list[tuple[StoredRows, ...] | None]] = {}
    for columns in episodes:
        for key, column in columns.items():
            found.setdefault(key, []).append(_plain_parts(column))
    plain = {key: parts for key, each in found.items() if (parts := _alike(each)) is not None}
    paths = list(dict.fromkeys(part.path for parts in plain.values() for each in parts for part in each))
    if not paths or len(paths) > MAX_FILES:
        return {}
    files = _MappedFiles(paths)
    return {
        key: files.pictures(parts, lengths) if key.startswith(IMAGE_PREFIX) else files.numbers(parts, lengths)
        for key, parts in plain.items()
    }


def _plain_parts(column: Column | None) -> tuple[StoredRows, ...] | None:
    """Return the data sets of a column, if it is just their plain rows; else None."""
    if isinstance(column, Pictures) and column.is_plain:
        column = column.rows
    parts = column.parts if isinstance(column, Joined) else (column,)
    plain = tuple(part for part in parts if isinstance(part, StoredRows) and part.is_aligned)
    return plain if len(plain) == len(parts) else None


def _alike(episodes: Sequence[tuple[StoredRows, ...] | None]) -> list[tuple[StoredRows, ...]] | None:
    """Return the parts of every episode, if all have the same dtypes and row shapes; else None."""
    known = [parts for parts in episodes if parts is not None]
    forms = {tuple((part.dtype, part.row_shape) for part in parts) for parts in known}
    return known if len(known) == len(episodes) and len(forms) == 1 else None


_Stored = Sequence[tuple[StoredRows, ...]]  # the parts of one key in every episode


class _MappedFiles:
    """Files mapped one after another into one range of addresses, each aligned to a page."""

    def __init__(self, paths: Sequence[Path]):
        sizes = [path.stat().st_size for path in paths]
        pages = [math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        starts = np.cumsum([0, *pages])
        # Reserve the whole range, then map file by file over it. Python's own mappings would keep each file open.
        self._reserved = mmap.mmap(
            -1, int(starts[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
        )
        address = np.frombuffer(self._reserved, np.uint8).ctypes.data
        self._starts = dict(zip(paths, starts.tolist(), strict=False))
        self._sizes = dict(zip(paths, sizes, strict=True))
        for path, start, size in zip(paths, starts.tolist(), sizes, strict=False):
            _overlay(address + start, size, path)

    def pictures(self, episodes: _Stored, lengths: Int[np.ndarray, " n"]) -> MappedRows:
        first = episodes[0][0]
        return self._rows(episodes, lengths, first.row_shape, first.dtype)

    def numbers(self, episodes: _Stored, lengths: Int[np.ndarray, " n"]) -> MappedRows:
        """Return numbers like ``columns.Joined``: side by side, as float32."""
        width = sum(math.prod(part.row_shape) for part in episodes[0])
        return self._rows(episodes, lengths, (width,), np.dtype(np.float32))

    def _rows(
        self, episodes: _Stored, lengths: Int[np.ndarray, " n"], row_shape: tuple[int, ...], dtype: np.dtype
    ) -> MappedRows:
        ends = np.cumsum(lengths)
        parts = tuple(self._part(stored, ends - lengths) for stored in zip(*episodes, strict=True))
        return MappedRows(parts, ends, row_shape, dtype)

    def _part(self, episodes: Sequence[StoredRows], first_rows: Int[np.ndarray, " n"]) -> _Part:
        dtype, width = episodes[0].dtype, math.prod(episodes[0].row_shape)
        offsets = np.array([self._start(stored) for stored in episodes])
        return _Part(self._reserved, dtype, width, offsets // dtype.itemsize - first_rows * width)

    def _start(self, stored: StoredRows) -> int:
        assert stored.offset is not None, "is_aligned was asked"
        end = stored.offset + len(stored) * math.prod(stored.row_shape) * stored.dtype.itemsize
        if end > self._sizes[stored.path]:
            raise ValueError(f"{stored.path}: {stored.label}: the file is shorter than it was. Was it replaced?")
        return self._starts[stored.path] + stored.offset


def _overlay(address: int, size: int, path: Path) -> None:
    """Map a file over reserved addresses; the mapping needs no open file."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    numbers = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    library.mmap.argtypes = numbers
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = library.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    finally:
        os.close(descriptor)
    if done != address:
        error = ctypes.get_errno()
        raise OSError(error, f"the file cannot be mapped into memory: {os.strerror(error)}", str(path))


_MAP_FIXED = 0x10  # on Linux and macOS
