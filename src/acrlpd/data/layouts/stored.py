"""Encode the columns of a data set's episodes as JSON, and decode them when an episode is used.

10,000 episodes with three cameras are a hundred thousand objects; as JSON they take a few megabytes and no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acrlpd.data.layouts.columns import (
    Column,
    Converted,
    Joined,
    Jpegs,
    Picked,
    Pictures,
    Rows,
    axis_angle,
)
from acrlpd.data.layouts.mp4 import Video
from acrlpd.data.video import VideoReaders

CONVERSIONS = {"axis_angle": axis_angle}


def encode(columns: Mapping[str, Column]) -> bytes:
    return json.dumps({key: _encode(column) for key, column in columns.items()}).encode()


def decode(text: bytes, readers: VideoReaders) -> dict[str, Column]:
    """Return the columns. All videos of the data set share ``readers``, which limits the number of open files."""
    return {key: _decode(stored, readers) for key, stored in json.loads(text).items()}


def _encode(column: Column) -> list[Any]:
    match column:
        case Rows():
            place = [str(column.path), column.name, column.label]
            return ["rows", *place, column.shape, column.dtype.str, column.offset]
        case Pictures():
            return ["pictures", _encode(column.rows), column.flip]
        case Jpegs():
            return ["jpegs", _encode(column.rows), column.row_shape, column.bgr]
        case Video():
            return ["video", str(column.path), column.label, column.num_frames, column.row_shape]
        case Joined():
            return ["joined", [_encode(part) for part in column.parts]]
        case Picked():
            return ["picked", _encode(column.column), column.picks.tolist()]
        case Converted():
            name = next(name for name, function in CONVERSIONS.items() if function is column.function)
            return ["converted", _encode(column.column), name, column.row_shape]
    raise TypeError(f"no stored form for a column of type {type(column).__name__}: add one here")


def _decode(stored: list[Any], readers: VideoReaders) -> Any:
    kind, first, *rest = stored
    match kind:
        case "rows":
            name, label, shape, dtype, offset = rest
            return Rows(Path(first), name, label, tuple(shape), np.dtype(dtype), offset)
        case "video":
            label, num_frames, row_shape = rest
            return Video(Path(first), label, num_frames, tuple(row_shape), readers)
        case "joined":
            return Joined(tuple(_decode(part, readers) for part in first))
    column = _decode(first, readers)
    match kind:
        case "pictures":
            return Pictures(column, tuple(rest[0]))
        case "jpegs":
            return Jpegs(column, tuple(rest[0]), rest[1])
        case "picked":
            return Picked(column, np.array(rest[0], int))
        case "converted":
            return Converted(column, CONVERSIONS[rest[0]], tuple(rest[1]))
    raise ValueError(f"unknown stored column {kind!r}")
