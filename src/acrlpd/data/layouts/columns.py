"""Columns of an episode file, read window by window, and the checks that every HDF5 layout shares.

A layout finds the episodes and says of which columns each one consists; ``acrlpd.data.hdf5`` does the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from acrlpd.data.episodes import IMAGE_PREFIX, OptionError, check_fps
from acrlpd.data.options import check_format
from acrlpd.types import typed


class Column(Protocol):
    """One key of one episode: rows in time order."""

    @property
    def path(self) -> Path:
        """The file it lies in."""
        ...

    @property
    def label(self) -> str:
        """Its name in the format, for messages."""
        ...

    @property
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str:
        """``numpy.dtype.kind``."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "t *row"]:
        """Rows ``start`` to ``stop`` (exclusive)."""
        ...


@dataclasses.dataclass(frozen=True)
class Record:
    """What a layout knows of an episode whose numbers it has checked."""

    columns: dict[str, Column]  # state, actions and images/<camera>
    task: str = ""  # empty: the format has no text for it
    success: bool | None = None  # None: the format does not say
    rewards: Float[np.ndarray, " t"] | None = None  # as stored; None where none are
    terminals: Shaped[np.ndarray, " t"] | None = None  # as stored; our own layout alone has them

    def __len__(self) -> int:
        return len(self.columns["actions"])

    @property
    def features(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Row shape and dtype kind by name: what must agree across the episodes of a data set."""
        named = {key: column for key, column in self.columns.items() if not isinstance(column, Joined)}
        for column in self.columns.values():
            if isinstance(column, Joined):
                named |= {part.label: part for part in column.parts}
        return {name: (column.row_shape, column.kind) for name, column in named.items()}


class Layout(Protocol):
    """Where the episodes of a data set lie; found again by its index before any is skipped."""

    name: str
    fps: float | None  # None: the format does not say
    sources: list[str]  # file (and group) of each episode

    def scan(self, index: int) -> Record:
        """Reads and checks all numbers of an episode, and the headers of its pictures.

        Raises:
            ValueError: names file, episode and key.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose about reading; see ``H5DatasetReader``."""

    fps: float | None = None
    default_task: str = ""
    state_keys: tuple[str, ...] | None = None
    action_keys: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    filter_key: str | None = None
    align_observations: bool = False
    jpeg_bgr: bool = False
    drop_idle: bool = False

    def __post_init__(self):
        check_fps(self.fps)
        for name in ("state_keys", "action_keys"):
            if getattr(self, name) == ():
                raise OptionError(f"{name} names no key. Leave it out for the default of the format.")

    def check(self, layout: str) -> None:
        """Refuses options that mean nothing to ``layout``."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name):
                check_format(field.name, layout)


class Reading:
    """An open HDF5 file in which every I/O error names the file and says what is likely wrong."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> h5py.File:
        if not self.path.is_file():
            reason = "the link leads to no file" if self.path.is_symlink() else "no such file"
            raise FileNotFoundError(f"{self.path}: {reason}")
        try:
            self.file = h5py.File(self.path, "r")
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self.file.close()
        if isinstance(error, OSError | RuntimeError):  # h5py raises either, depending on what is damaged
            raise self._damaged(error) from error
        if isinstance(error, LookupError | TypeError | AttributeError):  # and these for what is no such thing
            raise ValueError(
                f"{self.path}: expected another content: something in it has a type or shape that its layout does not "
                f"have ({error})"
            ) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: expected a complete HDF5 file; it is truncated or not HDF5 ({error})")


def dataset(where: str, group: h5py.Group, label: str) -> h5py.Dataset:
    found = group.get(label)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where}: {label}: expected a dataset, found {'nothing' if found is None else 'a group'}")
    return found


def group(where: str, parent: h5py.Group, label: str) -> h5py.Group:
    found = parent.get(label)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{where}: {label}: expected a group, found {'nothing' if found is None else 'a dataset'}")
    return found


def names(where: str, parent: h5py.Group, label: str) -> list[str]:
    """What a group has; an absent one has nothing."""
    return list(group(where, parent, label)) if label in parent else []


@dataclasses.dataclass(frozen=True)
class Rows:
    """A dataset. Where its numbers lie in the file as in memory, a window is read without HDF5."""

    path: Path
    name: str  # in the file
    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None  # first byte in the file; None where the numbers are chunked, compressed or elsewhere

    @classmethod
    def of(cls, where: str, data: h5py.Dataset, label: str, *, kinds: str, ranks: Sequence[int]) -> Rows:
        """What a data set holds; refuses other dtype kinds and numbers of axes."""
        shape, dtype = data.shape, data.dtype
        if shape is None:
            raise ValueError(f"{where}: {label}: expected numbers, found a dataset without any content")
        if dtype.kind not in kinds:
            names = " or ".join(
                {"f": "floats", "i": "integers", "u": "unsigned integers", "b": "booleans"}[kind] for kind in kinds
            )
            raise ValueError(f"{where}: {label}: expected {names}, found {dtype}")
        if len(shape) not in ranks:
            expected = " or ".join(map(str, ranks))
            raise ValueError(f"{where}: {label}: expected {expected} axes, time first, found shape {shape}")
        offset = data.id.get_offset() if data.chunks is None and not data.external and not data.is_virtual else None
        path = Path(os.fsdecode(h5py.h5f.get_name(data.id)))  # data.file would make an object of all of the file
        return cls(path, data.name, label, shape, dtype, offset)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def kind(self) -> str:
        return self.dtype.kind

    @property
    def is_aligned(self) -> bool:
        """Whether the file, mapped into memory, is an array of these numbers."""
        return self.offset is not None and self.offset % self.dtype.itemsize == 0

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        if self.offset is not None and stop > start:
            return self._read_plain(start, stop, self.offset)
        with Reading(self.path) as file:
            return dataset(str(self.path), file, self.name)[start:stop]

    def _read_plain(self, start: int, stop: int, offset: int) -> np.ndarray:
        """The bytes of the rows, without HDF5. Not a mapping: one that outlives its file would crash the process."""
        size = math.prod(self.row_shape)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset + start * self.dtype.itemsize * size)
            values = np.fromfile(file, self.dtype, (stop - start) * size)
        if len(values) < (stop - start) * size:
            raise ValueError(
                f"{self.path}: {self.label}: rows {start}..{stop} cannot be read any more: the file is shorter than it "
                "was. Was it replaced while it was in use?"
            )
        return values.reshape(stop - start, *self.row_shape)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A column of numbers after a function of its rows."""

    column: Column
    function: Callable[[np.ndarray], np.ndarray]
    row_shape: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.column.path

    @property
    def label(self) -> str:
        return self.column.label

    @property
    def kind(self) -> str:
        return self.column.kind

    def __len__(self) -> int:
        return len(self.column)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.function(self.column.read(start, stop))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Numbers of several columns side by side, as float32; a column of scalars becomes one of width 1."""

    parts: tuple[Column, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def label(self) -> str:
        return " ++ ".join(part.label for part in self.parts)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (sum(part.row_shape[0] if part.row_shape else 1 for part in self.parts),)

    @property
    def kind(self) -> str:
        return "f"

    def __len__(self) -> int:
        return len(self.parts[0])

    def read(self, start: int, stop: int) -> Float[np.ndarray, "t s"]:
        blocks = [part.read(start, stop) for part in self.parts]
        flat = [block.reshape(len(block), math.prod(block.shape[1:])) for block in blocks]
        return np.concatenate(flat, axis=1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Raw RGB pictures; ``flip`` names the axes of a picture to turn around (0 rows, 1 columns)."""

    rows: Rows
    flip: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        return self.rows.path

    @property
    def label(self) -> str:
        return self.rows.label

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.rows.row_shape

    @property
    def kind(self) -> str:
        return "u"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        frames = np.flip(self.rows.read(start, stop), tuple(axis + 1 for axis in self.flip))
        return np.ascontiguousarray(frames)


@dataclasses.dataclass(frozen=True)
class Jpegs:
    """One JPEG a row, padded with zeros. Decoders stop at the end marker, so the byte counts are not needed."""

    rows: Rows
    row_shape: tuple[int, ...]  # of the first picture
    bgr: bool = False  # the recorder had red and blue the wrong way round

    @classmethod
    def of(cls, rows: Rows, *, bgr: bool = False) -> Jpegs:
        width, height = _open_jpeg(rows, 0, rows.read(0, 1)[0]).size
        return cls(rows, (height, width, 3), bgr)

    @property
    def path(self) -> Path:
        return self.rows.path

    @property
    def label(self) -> str:
        return self.rows.label

    @property
    def kind(self) -> str:
        return "u"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        frames = np.empty((stop - start, *self.row_shape), np.uint8)
        for frame, (number, row) in zip(frames, enumerate(self.rows.read(start, stop), start), strict=True):
            frame[...] = self._decode(number, row)
        return frames[..., ::-1].copy() if self.bgr else frames

    def _decode(self, number: int, row: UInt8[np.ndarray, " bytes"]) -> np.ndarray:
        picture = _open_jpeg(self.rows, number, row)
        try:
            frame = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged data
            raise _bad_jpeg(self.rows, number, error) from error
        if frame.shape != self.row_shape:
            raise ValueError(
                f"{self.rows.path}: {self.label}: the JPEG image of frame {number} has shape {frame.shape}, "
                f"expected {self.row_shape} as in frame 0"
            )
        return frame


def _open_jpeg(rows: Rows, number: int, row: np.ndarray) -> Image.Image:
    try:
        return Image.open(io.BytesIO(row.tobytes()))
    except OSError as error:
        raise _bad_jpeg(rows, number, "these are no picture's bytes") from error
    except Image.DecompressionBombError as error:  # what a damaged size field looks like
        raise _bad_jpeg(rows, number, error) from error


def _bad_jpeg(rows: Rows, number: int, reason: object) -> ValueError:
    return ValueError(
        f"{rows.path}: {rows.label}: the image of frame {number} cannot be decoded: expected a JPEG ({reason})"
    )


@dataclasses.dataclass(frozen=True)
class Picked:
    """Some rows of a column, in rising order."""

    column: Column
    picks: np.ndarray

    @property
    def path(self) -> Path:
        return self.column.path

    @property
    def label(self) -> str:
        return self.column.label

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.column.row_shape

    @property
    def kind(self) -> str:
        return self.column.kind

    def __len__(self) -> int:
        return len(self.picks)

    def read(self, start: int, stop: int) -> np.ndarray:
        wanted = self.picks[start:stop]
        if not len(wanted):
            return self.column.read(0, 0)
        first, last = int(wanted[0]), int(wanted[-1])
        return self.column.read(first, last + 1)[wanted - first]


def numbers(where: str, group: h5py.Group, label: str, *, kinds: str = "fiu", ranks: Sequence[int] = (1, 2)) -> Rows:
    """A dataset of one or several numbers a step, all of them finite."""
    data = dataset(where, group, label)
    rows = Rows.of(where, data, label, kinds=kinds, ranks=ranks)
    check_finite(where, label, data[...])
    return rows


def vector(where: str, group: h5py.Group, label: str, *, kinds: str = "fiub") -> Shaped[np.ndarray, " t"]:
    """One finite number a step, in memory."""
    data = dataset(where, group, label)
    Rows.of(where, data, label, kinds=kinds, ranks=(1,))
    values = data[...]
    check_finite(where, label, values)
    return values


def raw_pictures(where: str, group: h5py.Group, label: str, *, flip: tuple[int, ...] = ()) -> Pictures:
    rows = Rows.of(where, dataset(where, group, label), label, kinds="u", ranks=(4,))
    if rows.dtype != np.uint8 or rows.row_shape[-1] != 3:
        raise ValueError(f"{where}: {label}: expected uint8 (T, h, w, 3), found {rows.dtype} {rows.shape}")
    return Pictures(rows, flip)


def check_finite(where: str, label: str, array: np.ndarray) -> None:
    """As float32, which all numbers become: a larger one would be infinite there."""
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        place = tuple(np.argwhere(~finite)[0].tolist())
        raise ValueError(f"{where}: {label}: expected finite float32 numbers, found {array[place]} in row {place[0]}")


def check_lengths(where: str, lengths: Mapping[str, int]) -> int:
    """The number of steps; every key must have one row a step. Most of them decide which one is wrong."""
    steps = collections.Counter(lengths.values()).most_common(1)[0][0]
    for label, length in lengths.items():
        if length != steps:
            others = ", ".join(other for other in lengths if lengths[other] == steps)
            raise ValueError(f"{where}: {label}: expected {steps} rows (as in {others}), found {length}")
    if steps < 1:
        raise ValueError(f"{where}: expected at least 1 step, found 0 steps. Leave empty episodes out.")
    return steps


def checked(where: str, record: Record) -> Record:
    """The record, if it has one row a step of every key."""
    parts = [part for column in record.columns.values() for part in _parts(column)]
    lengths = {part.label: len(part) for part in parts}
    for label, values in {"rewards": record.rewards, "terminals": record.terminals}.items():
        if values is not None:
            lengths[label] = len(values)
    check_lengths(where, lengths)
    return record


def _parts(column: Column) -> Sequence[Column]:
    return column.parts if isinstance(column, Joined) else (column,)


def choose_cameras(where: str, found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The cameras of an episode that are to be read: those asked for, by default all."""
    missing = [camera for camera in wanted or () if camera not in found]
    if missing:
        raise OptionError(
            f"{where}: {IMAGE_PREFIX}{missing[0]}: no such camera; the episode has {', '.join(found) or 'none'}"
        )
    return list(found if wanted is None else wanted)


def text(where: str, name: str, value: Any) -> str:
    """An attribute as text. h5py hands out invalid UTF-8 as surrogates, or as bytes where the length is fixed."""
    if not isinstance(value, str | bytes):
        raise ValueError(f"{where}: attribute {name}: expected text, found {value!r}")
    try:
        return (value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{where}: attribute {name}: expected UTF-8 text ({error})") from error


KNOWN_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def flag(where: str, name: str, value: Any) -> bool | None:
    """An attribute that is true or false: a boolean, 0, 1 or such a word; an absent one (None) is unknown."""
    if value is None:
        return None
    plain = value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value
    word = text(where, name, plain).strip().lower() if isinstance(plain, str | bytes) else str(plain).lower()
    if word.removesuffix(".0") not in KNOWN_FLAGS:
        raise ValueError(f"{where}: {name}: expected true or false, found {value!r}")
    return KNOWN_FLAGS[word.removesuffix(".0")]


def json_text(where: str, name: str, value: Any) -> dict[str, Any]:
    """An attribute that holds a JSON object; an absent one (None) is empty."""
    try:
        parsed = json.loads(text(where, name, value)) if value is not None else {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: attribute {name}: expected JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: attribute {name}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


@typed
def axis_angle(quaternions: Float[np.ndarray, "t 4"]) -> Float[np.ndarray, "t 3"]:
    """Rotation vectors of quaternions (x, y, z, w), with the angle in 0..2 pi as robosuite has it."""
    quaternions = quaternions.astype(np.float64)  # near 0 and pi, float32 leaves half the digits
    w = np.clip(quaternions[:, 3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w**2)  # of half the angle
    still = sine < 1e-8
    scale = np.where(still, 0.0, 2.0 * np.arccos(w) / np.where(still, 1.0, sine))
    return quaternions[:, :3] * scale[:, None]
