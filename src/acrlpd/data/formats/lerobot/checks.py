"""Checks of one episode of a LeRobot dataset. Errors say what is wrong; the caller adds file and episode."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from acrlpd import files
from acrlpd.data.formats import pictures
from acrlpd.data.formats.lerobot.meta import INDEX, TIMESTAMP, EpisodeRow, is_numeric
from acrlpd.data.formats.parquet import DataError
from acrlpd.data.formats.pictures import PictureError

Cell = Mapping[str, Any] | bytes | np.ndarray | None  # a PNG or JPEG as ``{bytes, path}`` or bytes, or raw pixels

DAMAGE = (OSError, SyntaxError, ValueError, struct.error)  # Pillow raises each of them for damaged files


def first_row(row: EpisodeRow, table: dict[str, np.ndarray]) -> int:
    """Return the row of its file at which an episode begins; raise unless it has exactly the rows in the table."""
    for key in (INDEX, "episode_index"):
        if table[key].dtype.kind not in "iu":
            raise DataError(f"{key}: expected whole numbers, found {table[key].dtype}")
    num_rows = len(table[INDEX])
    if row.indices is None:
        if num_rows != row.length:
            raise DataError(f"the episode table gives it length {row.length}, but the file has {num_rows} rows")
        _check_own_rows(row, table["episode_index"].ravel(), table[INDEX].ravel())
        return 0
    start, stop = row.indices
    stated = f"dataset_from_index {start} to dataset_to_index {stop}"
    if stop - start != row.length:
        raise DataError(f"{stated} are {stop - start} rows, but its length is {row.length}")
    own = np.flatnonzero(table["episode_index"] == row.number)
    together = len(own) == row.length and own[-1] - own[0] == row.length - 1
    if not together or not np.array_equal(table[INDEX][own], np.arange(start, stop)):
        indices = table[INDEX][own]
        found = f"{len(own)} rows, index {indices[0]} to {indices[-1] + 1}" if len(own) else "none"
        raise DataError(f"the episode table gives it {stated}; the file has {found} with this episode_index")
    return int(own[0])


def _check_own_rows(row: EpisodeRow, episodes: np.ndarray, indices: np.ndarray) -> None:
    """Check that all rows of a single-episode file belong to it, and that none is missing or out of order."""
    foreign = np.flatnonzero(episodes != row.number)
    if len(foreign):
        frame = int(foreign[0])
        raise DataError(
            f"episode_index: expected {row.number} in every frame, found {episodes[frame]} in frame {frame}. "
            "The file, or this part of it, is another episode's."
        )
    gaps = np.flatnonzero(indices != indices[0] + np.arange(len(indices)))
    if len(gaps):
        frame = int(gaps[0])
        raise DataError(
            f"index: expected {indices[0] + frame}, one after another, found {indices[frame]} in frame {frame}"
        )


def check_values(key: str, values: np.ndarray, features: dict[str, dict[str, Any]]) -> None:
    """Check the shape and the dtype kind of a column, and that all values are finite as float32."""
    if key not in features:
        raise DataError(f"{key}: info.json does not list this column")
    if not is_numeric(features[key]["dtype"]):
        raise DataError(f"{key}: expected numbers, but info.json gives the column dtype {features[key]['dtype']!r}")
    shape, dtype = tuple(features[key]["shape"]), np.dtype(features[key]["dtype"])
    allowed = ((), (1,)) if shape in ((), (1,)) else (shape,)  # a feature of one number is stored as a plain column
    if values.shape[1:] not in allowed:
        raise DataError(f"{key}: expected shape {shape} in every frame, as in info.json, found {values.shape[1:]}")
    if values.dtype.kind != dtype.kind:
        raise DataError(f"{key}: expected {dtype}, as in info.json, found {values.dtype}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False)).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        frame = int(np.argmin(finite))
        raise DataError(f"{key}: expected finite float32 numbers, found {values[frame].ravel()} in frame {frame}")


def check_clock(rows: dict[str, np.ndarray], fps: float, tolerance_s: float) -> None:
    """Check that ``frame_index`` counts from 0, and that every timestamp lies 1/fps after the one before it.

    A timestamp is a float32; after 17 minutes its resolution is no better than the tolerance. Therefore its spacing is
    added to the tolerance.
    """
    length = len(rows[TIMESTAMP])
    if not np.array_equal(rows["frame_index"].ravel(), np.arange(length)):
        raise DataError(f"frame_index: expected 0 to {length - 1} in order, found {rows['frame_index'].ravel()}")
    times = rows[TIMESTAMP].ravel()
    steps = np.diff(times.astype(np.float64))
    wrong = np.abs(steps - 1 / fps) > tolerance_s + np.spacing(np.abs(times[1:])).astype(np.float64)
    if wrong.any():
        frame = int(np.argmax(wrong))
        raise DataError(
            f"timestamp: expected steps of 1/fps = {1 / fps:.6f} s (fps {fps:g}, tolerance {tolerance_s:g} s), found "
            f"{steps[frame]:.6f} s from frame {frame} to {frame + 1}"
        )


def check_start(rows: dict[str, np.ndarray], tolerance_s: float) -> None:
    """Refuse a first timestamp that is not 0: video frames are looked up by the time since the episode began."""
    first = float(rows[TIMESTAMP].ravel()[0])
    if abs(first) > tolerance_s:
        raise DataError(
            f"timestamp: expected 0 s in frame 0, because frames of videos are looked up by it, found {first:.6f} s. "
            "Count it from the episode's beginning."
        )


def decode_images(cells: Sequence[Cell], first: int, size: tuple[int, int]) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode cells to RGB; all have ``size`` (height, width). ``first`` is the number of the first frame."""
    files.check_memory("pictures", len(cells) * math.prod(size) * 3, DataError)
    frames = np.empty((len(cells), *size, 3), np.uint8)
    for frame, (cell, picture) in enumerate(zip(cells, frames, strict=True), start=first):
        _check_size(_size(cell, frame), frame, size)
        try:
            picture[:] = _decoded(cell, frame)
        except PictureError as error:
            raise DataError(f"frame {frame}: {error}") from error
    return frames


def _decoded(cell: Cell, frame: int) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(cell, np.ndarray):
        return pictures.rgb_rows(cell[None])[0]
    with _opened_image(cell, frame) as image:
        return pictures.decoded(image)


def check_image(cell: Cell, frame: int, size: tuple[int, int]) -> None:
    """Raise unless a picture is there and its header says this size (height, width)."""
    _check_size(_size(cell, frame), frame, size)


def check_colour(cell: Cell) -> None:
    """Raise ``PictureError`` unless the first picture of an episode is 8-bit colour."""
    if isinstance(cell, np.ndarray):
        pictures.rgb_rows(cell[None])
        return
    with _opened_image(cell, 0) as image:
        pictures.check_colour(image)


def _check_size(found: tuple[int, int], frame: int, size: tuple[int, int]) -> None:
    if found != size:
        raise DataError(
            f"frame {frame}: expected {told_size(size)}, as most episodes have it, found {told_size(found)}"
        )


def image_size(cell: Cell) -> tuple[int, int]:
    """Read height and width from the header of the picture in an episode's first cell."""
    return _size(cell, 0)


def _size(cell: Cell, frame: int) -> tuple[int, int]:
    if isinstance(cell, np.ndarray):
        try:
            return pictures.rgb_shape(cell.shape, cell.dtype)[:2]
        except PictureError as error:
            raise DataError(f"frame {frame}: {error}") from error
    with _opened_image(cell, frame) as image:
        return image.height, image.width


def told_size(size: Sequence[int] | None) -> str:
    return "no picture" if size is None else f"pictures of {size[0]}x{size[1]}"


@contextmanager
def _opened_image(cell: Mapping[str, Any] | bytes | None, frame: int) -> Iterator[Image.Image]:
    """Open the picture in a cell; damage becomes an error that names the frame."""
    cell = {"bytes": cell} if isinstance(cell, bytes) else cell
    if not isinstance(cell, Mapping | None):
        raise DataError(f"frame {frame}: expected a cell with bytes and path, found {type(cell).__name__}")
    content = (cell or {}).get("bytes")
    if not content:
        raise DataError(f"frame {frame}: no image is embedded, only its path: {(cell or {}).get('path')}")
    try:
        with files.open_picture(content) as image:
            yield image
    except (DataError, PictureError):
        raise
    except DAMAGE as error:
        raise DataError(
            f"frame {frame}: the embedded image does not decode: expected a PNG or JPEG ({error})"
        ) from error
