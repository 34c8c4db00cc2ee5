"""Columns of parquet files as numpy arrays, with a memory limit for the cache.

Only types and values are read: the schema metadata of dataset libraries differs between their releases.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from acrlpd.files import check_memory, listed, one_line

MAX_BYTES = 256 << 20
MAX_VALUES_A_BYTE = 100


class DataError(ValueError):
    """An error that says what is wrong with a file or a column; the caller adds file and episode."""


class ParquetReader:
    """A reader of whole columns, or of cells of one; caches up to ``max_bytes``. Threads may share it."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._kept = _Kept(max_bytes)

    def __reduce__(self) -> tuple[type[ParquetReader], tuple[int]]:
        """Pickle without the cache: a copy in another process reads again."""
        return ParquetReader, (self._max_bytes,)

    def names(self, path: Path) -> list[str]:
        return list(self._metadata(path).schema.to_arrow_schema().names)

    def num_rows(self, path: Path) -> int:
        return self._metadata(path).num_rows

    def columns(self, path: Path, names: Sequence[str]) -> dict[str, Shaped[np.ndarray, "n *shape"]]:
        """Read whole columns together. Nested lists must have the same length in every row."""
        return self._kept.get((path, *names), lambda: self._read(path, names))

    def cells(self, path: Path, name: str, start: int, stop: int) -> list[Any]:
        """Return cells of one column as Python objects, lists as arrays. Only the row groups of these are read."""
        metadata, cells, first = self._metadata(path), [], 0
        for group in range(metadata.num_row_groups):
            last = first + metadata.row_group(group).num_rows
            if first < stop and start < last:
                read = functools.partial(self._read_group, path, name, group)
                column = self._kept.get((path, name, group), read)
                low, high = max(start, first) - first, min(stop, last) - first
                cells += _to_cells(column.slice(low, high - low), name)
            first = last
        return cells

    def cell(self, path: Path, name: str, row: int) -> Any:
        """Return one cell like ``cells``. Little more than the rows before it in its row group is read."""
        self._check_names(path, [name])
        metadata, group = self._metadata(path), 0
        while row >= metadata.row_group(group).num_rows:
            row -= metadata.row_group(group).num_rows
            group += 1

        def read() -> Any:
            file = import_pyarrow().parquet.ParquetFile(path, pre_buffer=False)
            batches = file.iter_batches(row + 1, row_groups=[group], columns=[name])
            column = next(batches).column(0).slice(row, 1)
            return _to_cells(import_pyarrow().chunked_array([column]), name)[0]

        return _readable(path, read)

    def _metadata(self, path: Path) -> Any:
        parquet = import_pyarrow().parquet
        return self._kept.get((path,), lambda: _readable(path, lambda: checked(parquet.read_metadata(path), path)))

    def _read(self, path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
        self._check_names(path, names)
        # a ParquetFile, because read_table would read "chunk-000" in a path as the value of a partition
        file = import_pyarrow().parquet.ParquetFile
        table = _readable(path, lambda: file(path).read(columns=list(names)))
        return {name: _to_numpy(table[name], name) for name in names}

    def _read_group(self, path: Path, name: str, group: int) -> Any:
        self._check_names(path, [name])
        file = import_pyarrow().parquet.ParquetFile
        return _readable(path, lambda: file(path).read_row_group(group, columns=[name])[name])

    def _check_names(self, path: Path, names: Sequence[str]) -> None:
        present = self.names(path)
        missing = [name for name in names if name not in present]
        if missing:
            raise DataError(f"column {missing[0]!r} is missing; the file has {listed(present)}")
        twice = [name for name in names if present.count(name) > 1]
        if twice:
            raise DataError(f"column {twice[0]!r} occurs more than once; expected one of each name")


class _Kept:
    """A cache of up to ``max_bytes``; the least recently used item is dropped first."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        item = make()
        with self._lock:
            if key not in self._items:
                self._items[key] = item
                self._nbytes += _nbytes(item)
            while self._nbytes > self._max_bytes:
                self._nbytes -= _nbytes(self._items.popitem(last=False)[1])
        return item


def _nbytes(item: Any) -> int:
    if isinstance(item, dict):
        return sum(array.nbytes for array in item.values())
    return item.nbytes if hasattr(item, "nbytes") else item.serialized_size  # a column, or a file's metadata


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    """Return ``read()``; damage becomes a ``DataError`` in plain words."""
    arrow = import_pyarrow()
    if not path.is_file():
        raise DataError("no such parquet file")
    try:
        return read()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"expected a complete parquet file ({one_line(error)}). It is truncated, or its recorder was not closed "
            "properly and left it without a footer."
        ) from error


def checked(metadata: Any, path: Path) -> Any:
    """Return a file's metadata; raise if its columns would be too large for the file, or for this machine's memory.

    Columns with one repeated value take almost no space, but columns that count (index, time) do take some.
    """
    if metadata.num_rows * metadata.num_columns > MAX_VALUES_A_BYTE * path.stat().st_size:
        raise DataError(f"expected fewer rows in a file of this size, found {metadata.num_rows}. Is it damaged?")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]  # .column() could abort Python
    nbytes = sum(max(group.total_byte_size, group.num_rows * group.num_columns) for group in groups)
    check_memory("columns", nbytes, DataError)
    return metadata


def _to_cells(column: Any, name: str) -> list[Any]:
    """Return cells of lists as numpy arrays, and others as Python objects."""
    storage = getattr(column.type, "storage_type", column.type)
    return list(_to_numpy(column, name)) if hasattr(storage, "value_type") else column.to_pylist()


def _to_numpy(column: Any, name: str) -> np.ndarray:
    """Convert a column to an array; nested lists become axes."""
    arrow = import_pyarrow()
    array = column.combine_chunks()
    shape = [len(array)]
    while True:
        if isinstance(array, arrow.ExtensionArray):
            array = array.storage
        if array.null_count:
            raise DataError(f"{name}: {array.null_count} values are missing (null)")
        if not hasattr(array.type, "value_type") or arrow.types.is_dictionary(array.type):
            break
        shape.append(_list_length(array, name))
        array = array.flatten()
    if arrow.types.is_nested(array.type):
        raise DataError(f"{name}: expected numbers or text, found {array.type}")
    values = array.to_numpy(zero_copy_only=False)
    return values.reshape(shape)


def _list_length(array: Any, name: str) -> int:
    arrow = import_pyarrow()
    if arrow.types.is_fixed_size_list(array.type):
        return array.type.list_size
    if len(array) == 0:
        return 0
    limits = arrow.compute.min_max(arrow.compute.list_value_length(array)).as_py()
    if limits["min"] != limits["max"]:
        raise DataError(
            f"{name}: expected the same shape in every row, found lists of {limits['min']} to {limits['max']} numbers"
        )
    return limits["max"]


def import_pyarrow() -> Any:
    try:
        import pyarrow as pa
        from pyarrow import compute, parquet  # noqa: F401 - as attributes of pa
    except ImportError as error:
        raise ImportError("reading parquet files needs pyarrow: pip install 'acrlpd[lerobot]'") from error
    return pa
