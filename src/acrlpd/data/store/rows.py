"""The rows of one key, over all episodes in order: a growing array, or fixed rows that lie elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped


def _stretches(
    array: Shaped[np.ndarray, "r *shape"], steps: Int[np.ndarray, "b h"]
) -> Shaped[np.ndarray, "b h *shape"]:
    """Return windows of consecutive rows from ``steps[:, 0]`` on; rows past an episode's end are undefined.

    With each window viewed as one opaque item, numpy copies it at once, which is fast.
    """
    length, size = steps.shape[1], array[:1].nbytes
    if len(array) < length or not size or not array.flags.c_contiguous:
        return array[steps]
    items = np.ndarray((len(array) - length + 1,), np.dtype((np.void, length * size)), array, strides=(size,))
    found = items[np.minimum(steps[:, 0], len(items) - 1)]
    return found[:, None].view(array.dtype).reshape(*steps.shape, *array.shape[1:])


def as_finite(values: np.typing.ArrayLike, where: str) -> Float[np.ndarray, "..."]:
    """Return numbers as float32; raise a ValueError that begins with ``where`` if one is not finite."""
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite
        array = np.asarray(values, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{where} holds a number that is not finite (nan, inf, or beyond float32). Repair or skip it.")
    return array


@dataclasses.dataclass(frozen=True)
class FixedColumn:
    """A fixed number of rows that lie elsewhere: an array, or an object that is indexed like one. It cannot grow."""

    rows: Any

    def take(self, rows: Int[np.ndarray, "*shape"]) -> np.ndarray:
        return self.rows[rows]

    def stretches(self, steps: Int[np.ndarray, "b h"]) -> np.ndarray:
        return _stretches(self.rows, steps) if isinstance(self.rows, np.ndarray) else self.rows[steps]

    def append(self, rows: np.ndarray) -> None:
        raise ValueError("this EpisodeStore reads its rows from a source and cannot grow; append to a store of its own")

    def drop(self, count: int) -> None:
        raise ValueError("this EpisodeStore reads its rows from a source and cannot forget any")

    def reserve(self, num_rows: int) -> None:
        """Do nothing: the column cannot grow."""


class Column:
    """A growing array: rows are appended at the end and dropped at the front, and are always contiguous."""

    def __init__(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike):
        self._buffer = np.empty((0, *shape), dtype)
        self._begin = 0
        self._end = 0

    @property
    def rows(self) -> np.ndarray:
        """A view of the rows, valid until the next append."""
        return self._buffer[self._begin : self._end]

    def take(self, rows: Int[np.ndarray, "*shape"]) -> np.ndarray:
        return self.rows[rows]

    def stretches(self, steps: Int[np.ndarray, "b h"]) -> np.ndarray:
        return _stretches(self.rows, steps)

    def append(self, rows: np.ndarray) -> None:
        if self._end + len(rows) > len(self._buffer):
            kept = self._end - self._begin
            needed = kept + len(rows)
            if 3 * needed <= 2 * len(self._buffer):
                self._compact()
            else:
                self._grow(needed + needed // 2)
        self._buffer[self._end : self._end + len(rows)] = rows
        self._end += len(rows)

    def drop(self, count: int) -> None:
        self._begin += count

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more rows. Untouched pages cost nothing, so a generous count is harmless."""
        if self._end + count > len(self._buffer):
            self._grow(self._end - self._begin + count)

    def _grow(self, capacity: int) -> None:
        kept = self._end - self._begin
        buffer = np.empty((capacity, *self._buffer.shape[1:]), self._buffer.dtype)
        buffer[:kept] = self.rows
        self._buffer, self._begin, self._end = buffer, 0, kept

    def _compact(self) -> None:
        """Move the rows to the front in blocks no longer than the gap: numpy would buffer an overlapping copy."""
        kept, gap = self._end - self._begin, self._begin
        for start in range(0, kept, gap):
            block = min(gap, kept - start)
            self._buffer[start : start + block] = self._buffer[gap + start : gap + start + block]
        self._begin, self._end = 0, kept
