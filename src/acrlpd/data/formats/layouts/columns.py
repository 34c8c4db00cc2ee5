"""The numbers and pictures of an episode file, and the checks that every HDF5 layout shares.

A layout finds the episodes and the datasets of each one; ``acrlpd.data.formats.hdf5`` does the rest.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import h5py
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image

from acrlpd import files
from acrlpd.data.formats import pictures
from acrlpd.data.formats.options import check_format
from acrlpd.data.store.episodes import OptionError, check_fps
from acrlpd.types import typed


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A dataset of numbers with one row per step, as it is stored."""

    label: str  # name in the format, for messages
    shape: tuple[int, ...]
    kind: str  # the ``numpy.dtype.kind``
    values: Shaped[np.ndarray, "t *row"] | None  # None once they are kept elsewhere

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def stored(self) -> Shaped[np.ndarray, "t *row"]:
        assert self.values is not None, "they are kept elsewhere"
        return self.values

    def converted(self, function: Callable[[np.ndarray], np.ndarray]) -> Numbers:
        """Return the numbers after a function of the rows; as float64 or float32."""
        values = function(self.stored)
        return Numbers(self.label, values.shape, self.kind, values)

    def pick(self, steps: Int[np.ndarray, " n"]) -> Numbers:
        return Numbers(self.label, (len(steps), *self.shape[1:]), self.kind, self.stored[steps])


@dataclasses.dataclass(frozen=True)
class Joined:
    """The numbers of several datasets side by side; one with a number per step gets width 1."""

    parts: tuple[Numbers, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def label(self) -> str:
        return " ++ ".join(part.label for part in self.parts)

    @property
    def row_shape(self) -> tuple[int]:
        return (sum(math.prod(part.shape[1:]) for part in self.parts),)

    @property
    def values(self) -> Float[np.ndarray, "t s"]:
        blocks = [part.stored.reshape(len(part), math.prod(part.shape[1:])) for part in self.parts]
        return np.concatenate(blocks, axis=1, dtype=np.float32)

    def pick(self, steps: Int[np.ndarray, " n"]) -> Joined:
        return Joined(tuple(part.pick(steps) for part in self.parts))

    def without_values(self) -> Joined:
        return Joined(tuple(dataclasses.replace(part, values=None) for part in self.parts))


@dataclasses.dataclass(frozen=True)
class Record:
    """An episode whose numbers a layout has checked. Pictures are read when they are asked for."""

    numbers: dict[str, Joined]  # state and actions
    pictures: Mapping[str, Pictures]  # images/<camera>
    task: str = ""  # empty if the format has no instruction
    success: bool | None = None  # None if the format does not say
    rewards: Float[np.ndarray, " t"] | None = None  # as stored; None if there are none
    terminals: Shaped[np.ndarray, " t"] | None = None  # as stored; only our own layout has them
    task_changes: tuple[tuple[int, str], ...] = ()  # see ``Episode``; only our own layout has them
    task_mark: str = ""  # distinguishes a task without a text from others, such as the name of its file
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)  # reason for each camera that is not read
    final_state: Joined | None = None  # of the observation after the last action, one row; None: not recorded
    final_pictures: Mapping[str, Pictures] = dataclasses.field(default_factory=dict)  # likewise

    def __len__(self) -> int:
        return len(self.numbers["actions"])

    @property
    def features(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Row shape and dtype kind by name; they must agree across the episodes of a data set."""
        found: dict[str, tuple[tuple[int, ...], str]] = {
            key: (each.row_shape, "u") for key, each in self.pictures.items()
        }
        found |= {part.label: (part.shape[1:], part.kind) for each in self.numbers.values() for part in each.parts}
        return found if self.rewards is None else {**found, "rewards": ((), "f")}  # without any, they become zeros

    def without_numbers(self) -> Record:
        """Return the record without the state and the actions, which are by far the most of it."""
        numbers = {key: each.without_values() for key, each in self.numbers.items()}
        return dataclasses.replace(self, numbers=numbers)


class Layout(Protocol):
    """The episodes of a data set, as one format stores them. Indices also count episodes that are skipped later."""

    name: str
    fps: float | None  # None if the format does not say
    sources: list[str]  # file (and group) of each episode

    def scan(self, index: int) -> Record:
        """Read and check all numbers of an episode, and the headers of its pictures.

        Raises:
            ValueError: the episode cannot be used; the error names file, episode and key.
        """
        ...

    def unused(self, index: int) -> list[str]:
        """Name the numbers and pictures of an episode that could be read, but are not."""
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """The reader options that a user may choose; see ``H5DatasetReader``."""

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
        """Refuse options that mean nothing to ``layout``."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name):
                check_format(field.name, layout)


class Reading:
    """A context manager that opens an HDF5 file; every I/O error inside names the file and the likely cause."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> h5py.File:
        files.check_file(self.path)
        try:
            self.file = h5py.File(self.path, "r")
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self.file.close()
        if isinstance(error, OSError | RuntimeError | MemoryError):  # h5py raises any of these for a damaged file
            raise self._damaged(error) from error
        if isinstance(error, LookupError | TypeError | AttributeError):  # raised for objects of an unexpected kind
            raise ValueError(
                f"{self.path}: expected other content: something in it has a type or shape that its layout does not "
                f"have ({error})"
            ) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: expected a complete HDF5 file; it is truncated or not HDF5 ({error})")


ELSEWHERE = "links to other files are not followed; copy the data into this file"
MAX_LINKS = 16  # soft links to follow in a row; HDF5 has the same limit
KNOWN_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}


def find(where: str, parent: h5py.Group, label: str) -> h5py.Dataset | h5py.Group | None:
    """Return the object at ``label``, or None. Unlike HDF5 this does not follow links into other files."""
    _check_links(where, parent, label, MAX_LINKS)
    return parent.get(label)


def _check_links(where: str, parent: h5py.Group, label: str, most: int) -> None:
    """Refuse a path that leaves the file. Links inside the file are followed, at most ``most`` of them."""
    parts = [part for part in label.split("/") if part]
    for depth, part in enumerate(parts, 1):
        place = "/".join(parts[:depth]).encode("utf-8", "surrogateescape")
        kind = _kind_of_link(parent, place)
        if kind == h5py.h5l.TYPE_SOFT and most:
            target = parent.id.links.get_val(place).decode("utf-8", "surrogateescape")
            from_root = target.startswith("/")
            way = [*([] if from_root else parts[: depth - 1]), target, *parts[depth:]]
            _check_links(where, parent.file if from_root else parent, "/".join(way), most - 1)
            return
        if kind not in (None, h5py.h5l.TYPE_HARD):
            if kind == h5py.h5l.TYPE_SOFT:
                raise ValueError(f"{where}: {label}: its links lead in a circle ({part}); copy the data here")
            raise ValueError(f"{where}: {label}: {ELSEWHERE} ({part})")


def _kind_of_link(parent: h5py.Group, place: bytes) -> int | None:
    try:
        return parent.id.links.get_info(place).type
    except (KeyError, RuntimeError):  # there is no link
        return None


def dataset(where: str, group: h5py.Group, label: str) -> h5py.Dataset:
    """Return a dataset; raise if it is missing or some of its numbers were never stored."""
    found = find(where, group, label)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where}: {label}: expected a dataset, found {'nothing' if found is None else 'a group'}")
    _check_is_stored(f"{where}: {label}", found)
    return found


def check_inside(where: str, file: h5py.File) -> None:
    """Refuse a file that links to other files or lacks numbers; for libraries that read the file themselves."""
    labels: list[str] = []
    file.id.links.visit(lambda name: labels.append(os.fsdecode(name)))
    for label in labels:
        if isinstance(find(where, file, label), h5py.Dataset):
            dataset(where, file, label)


def _check_is_stored(where: str, data: h5py.Dataset) -> None:
    """Raise if the HDF5 library would return fill values, such as zeros, for numbers that were never stored."""
    if data.external:
        raise ValueError(f"{where}: {ELSEWHERE}")
    if data.is_virtual:
        _check_sources(where, data)
    elif data.chunks is not None:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
        if (written := data.id.get_num_chunks()) < expected:
            raise ValueError(f"{where}: {expected - written} of {expected} chunks were never written: rows are missing")
    elif data.size and not data.id.get_storage_size():
        raise ValueError(f"{where}: its {len(data)} rows were never written")
    if data.size and not data.is_virtual:
        _check_fits(where, data)


def _check_fits(where: str, data: h5py.Dataset) -> None:
    """Refuse a shape that is larger than what the file can hold, before any memory is allocated for it."""
    there = Path(os.fsdecode(h5py.h5f.get_name(data.id))).stat().st_size
    if data.chunks is not None:
        files.check_memory(f"{where}: a chunk", math.prod(data.chunks) * data.dtype.itemsize)
        stored = data.id.get_create_plist()
        if any(stored.get_filter(at)[0] not in KNOWN_FILTERS for at in range(stored.get_nfilters())):
            return
        there = data.id.get_storage_size() * files.MAX_RATIO
    if data.size * data.dtype.itemsize > there:
        raise ValueError(f"{where}: the shape {data.shape} is larger than what the file holds. Is it damaged?")


def _check_sources(where: str, data: h5py.Dataset) -> None:
    """Raise unless the sources of a virtual dataset lie in its own file and hold all of its numbers."""
    if None in data.maxshape:
        raise ValueError(f"{where}: this virtual dataset can grow, so its length is unknown; copy its data")
    mapped = 0
    for source in data.virtual_sources():
        if source.file_name != ".":
            raise ValueError(f"{where}: {ELSEWHERE}")
        found = dataset(where, data.file, source.dset_name)
        whole = source.src_space.get_select_type() == h5py.h5s.SEL_ALL
        ends = found.shape if whole else tuple(last + 1 for last in source.src_space.get_select_bounds()[1])
        count = source.vspace.get_select_npoints()
        if len(ends) != found.ndim or any(np.greater(ends, found.shape)) or found.size < count:
            raise ValueError(f"{where}: it is virtual, and its source {source.dset_name} lacks rows")
        mapped += count
    if mapped < data.size:
        raise ValueError(f"{where}: it is virtual, and {data.size - mapped} of its {data.size} numbers have no source")


def group(where: str, parent: h5py.Group, label: str) -> h5py.Group:
    found = find(where, parent, label)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{where}: {label}: expected a group, found {'nothing' if found is None else 'a dataset'}")
    return found


def names(where: str, parent: h5py.Group, label: str) -> list[str]:
    """Return the names in a group; none if there is no such group."""
    if find(where, parent, label) is None:
        return []
    return [files.check_name(name, f"{where}: {label}") for name in group(where, parent, label)]


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """The place of a dataset's rows. If the file holds them as one plain block, they are read without HDF5."""

    path: Path
    name: str  # path in the file
    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None  # first byte in the file; None if the rows are chunked, compressed or elsewhere

    @classmethod
    def at(cls, data: h5py.Dataset, label: str) -> StoredRows:
        plain = data.chunks is None and not data.is_virtual and not data.dtype.hasobject
        path = Path(os.fsdecode(h5py.h5f.get_name(data.id)))  # data.file would build a File object
        return cls(path, data.name, label, data.shape, data.dtype, data.id.get_offset() if plain else None)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        if self.offset is not None:
            return self._read_plain(start, stop, self.offset)
        files.check_memory(
            f"{self.path}: {self.label}", (stop - start) * math.prod(self.shape[1:]) * self.dtype.itemsize
        )
        with Reading(self.path) as file:
            return file[self.name][start:stop]

    def _read_plain(self, start: int, stop: int, offset: int) -> np.ndarray:
        """Read the rows without HDF5. A mapping would crash the process if its file were cut short."""
        size = math.prod(self.shape[1:])
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset + start * self.dtype.itemsize * size)
            values = np.fromfile(file, self.dtype, (stop - start) * size)
        if len(values) < (stop - start) * size:
            raise ValueError(
                f"{self.path}: {self.label}: rows {start}..{stop} cannot be read any more: the file is shorter than it "
                "was. Was it replaced while it was in use?"
            )
        return values.reshape(stop - start, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Pictures(abc.ABC):
    """The pictures of one camera in one episode, in time order: 8-bit RGB in the end, however they are stored."""

    path: Path
    label: str  # name in the format, for messages
    num_stored: int
    row_shape: tuple[int, ...]  # h, w, 3
    picks: tuple[int, ...] | None = None  # numbers of the stored pictures that count, ascending; None: all

    def __len__(self) -> int:
        return self.num_stored if self.picks is None else len(self.picks)

    def pick(self, steps: Int[np.ndarray, " n"]) -> Self:
        """Return some of the pictures; ``steps`` ascend."""
        before = np.arange(len(self)) if self.picks is None else np.array(self.picks, int)
        return dataclasses.replace(self, picks=tuple(before[steps].tolist()))

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Read the pictures ``start`` to ``stop`` (exclusive)."""
        if self.picks is None:
            return self._read(start, stop)
        wanted = np.array(self.picks[start:stop], int)
        if not len(wanted):
            return self._read(0, 0)
        return self._read(int(wanted[0]), int(wanted[-1]) + 1)[wanted - wanted[0]]

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Read pictures by their stored numbers."""

    @abc.abstractmethod
    def _encoded(self) -> list[Any]:
        """Return where all stored pictures are, as JSON values."""

    def encoded(self) -> list[Any]:
        """Return the pictures' place as JSON values, which ``hdf5`` decodes. Records of a frame cache depend on it."""
        return self._encoded() if self.picks is None else ["picked", self._encoded(), list(self.picks)]


@dataclasses.dataclass(frozen=True)
class DatasetPictures(Pictures):
    """Pictures in a dataset: as numbers, or as one JPEG or PNG per row."""

    rows: StoredRows = dataclasses.field(kw_only=True)
    is_encoded: bool = dataclasses.field(kw_only=True)  # padding does not matter: decoders stop at the end marker
    bgr: bool = dataclasses.field(default=False, kw_only=True)  # the recorder of JPEGs swapped red and blue
    flip: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)  # axes to reverse (0 rows, 1 columns)

    @classmethod
    def of(
        cls, rows: StoredRows, *, is_encoded: bool, bgr: bool = False, flip: tuple[int, ...] = ()
    ) -> DatasetPictures:
        """Check the first picture, if it is encoded; raise ``pictures.PictureError`` unless it is 8-bit colour."""
        shape = _encoded_shape(rows) if is_encoded else pictures.rgb_shape(rows.shape[1:], rows.dtype)
        return cls(rows.path, rows.label, len(rows), shape, rows=rows, is_encoded=is_encoded, bgr=bgr, flip=flip)

    def _read(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        frames = self._decoded(start, stop) if self.is_encoded else self._raw(start, stop)
        return np.ascontiguousarray(np.flip(frames, tuple(axis + 1 for axis in self.flip)))

    def _raw(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        try:
            return pictures.rgb_rows(self.rows.read(start, stop))
        except pictures.PictureError as error:
            raise ValueError(f"{self.path}: {self.label}: rows {start}..{stop}: {error}") from error

    def _decoded(self, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        files.check_memory(f"{self.path}: {self.label}", (stop - start) * math.prod(self.row_shape))
        frames = np.empty((stop - start, *self.row_shape), np.uint8)
        for frame, (number, row) in zip(frames, enumerate(_cells(self.rows, start, stop), start), strict=True):
            frame[...] = self._decode(number, row)
        return frames[..., ::-1] if self.bgr else frames

    def _decode(self, number: int, row: UInt8[np.ndarray, " bytes"]) -> np.ndarray:
        picture = _open_jpeg(self.rows, number, row)
        try:
            frame = pictures.decoded(picture)
        except (*DAMAGE, ValueError) as error:
            raise _bad_jpeg(self.rows, number, error) from error
        if frame.shape != self.row_shape:
            raise ValueError(
                f"{self.path}: {self.label}: the JPEG image of frame {number} has shape {frame.shape}, "
                f"expected {self.row_shape} as in frame 0"
            )
        return frame

    def _encoded(self) -> list[Any]:
        rows = self.rows
        place = ["rows", str(rows.path), rows.name, rows.label, rows.shape, rows.dtype.str, rows.offset]
        encoded = ["jpegs", place, self.row_shape, self.bgr] if self.is_encoded else place
        return encoded if self.is_encoded and not self.flip else ["pictures", encoded, self.flip]

    @classmethod
    def decode(cls, encoded: list[Any]) -> DatasetPictures:
        """Return what ``_encoded`` described."""
        kind, place, *rest = encoded
        if kind == "pictures" and place[0] == "jpegs":
            return dataclasses.replace(cls.decode(place), flip=tuple(rest[0]))
        _, path, name, label, shape, dtype, offset = place
        rows = StoredRows(Path(path), name, label, tuple(shape), np.dtype(dtype), offset)
        if kind == "pictures":
            return cls.of(rows, is_encoded=False, flip=tuple(rest[0]))
        row_shape, bgr = rest
        return cls(rows.path, label, len(rows), tuple(row_shape), rows=rows, is_encoded=True, bgr=bgr)


def _encoded_shape(rows: StoredRows) -> tuple[int, int, int]:
    """Return the shape of the first picture; raise ``pictures.PictureError`` unless it is 8-bit colour."""
    if not len(rows):
        return 0, 0, 3
    first = _open_jpeg(rows, 0, _cells(rows, 0, 1)[0])
    try:
        pictures.check_colour(first)
    except DAMAGE as error:
        raise _bad_jpeg(rows, 0, error) from error
    return first.height, first.width, 3


def _cells(rows: StoredRows, start: int, stop: int) -> np.ndarray:
    """Return the bytes of each picture. As fixed-length strings they would lose final zeros, which WebP may need."""
    cells = rows.read(start, stop)
    return cells.view(np.dtype((np.void, cells.itemsize))) if cells.dtype.kind == "S" else cells


DAMAGE = (OSError, SyntaxError)  # Pillow raises these, and ValueError, for damaged data


def _open_jpeg(rows: StoredRows, number: int, row: np.ndarray) -> Image.Image:
    try:
        return files.open_picture(row.tobytes())
    except ValueError as error:
        raise _bad_jpeg(rows, number, error) from error


def _bad_jpeg(rows: StoredRows, number: int, reason: object) -> ValueError:
    return ValueError(
        f"{rows.path}: {rows.label}: the image of frame {number} cannot be decoded: expected a JPEG or PNG ({reason})"
    )


def numbers(where: str, group: h5py.Group, label: str, *, kinds: str = "fiu", ranks: Sequence[int] = (1, 2)) -> Numbers:
    """Read a dataset with one or several numbers per step; all must be finite."""
    data = dataset(where, group, label)
    if data.shape is None:
        raise ValueError(f"{where}: {label}: expected numbers, found a dataset without any content")
    if data.dtype.kind not in kinds:
        words = {"f": "floats", "i": "integers", "u": "unsigned integers", "b": "booleans"}
        raise ValueError(f"{where}: {label}: expected {' or '.join(words[kind] for kind in kinds)}, found {data.dtype}")
    if data.ndim not in ranks:
        expected = " or ".join(map(str, ranks))
        raise ValueError(f"{where}: {label}: expected {expected} axes, time first, found shape {data.shape}")
    files.check_memory(f"{where}: {label}", data.size * data.dtype.itemsize)
    values = data[...]
    check_finite(where, label, values)
    return Numbers(label, data.shape, data.dtype.kind, values)


def vector(where: str, group: h5py.Group, label: str, *, kinds: str = "fiub") -> Shaped[np.ndarray, " t"]:
    """Read a dataset with one number per step; all must be finite."""
    return numbers(where, group, label, kinds=kinds, ranks=(1,)).stored


def check_finite(where: str, label: str, array: np.ndarray) -> None:
    """Refuse numbers that are not finite as float32, the dtype to which all of them are converted."""
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        place = tuple(np.argwhere(~finite)[0].tolist())
        raise ValueError(f"{where}: {label}: expected finite float32 numbers, found {array[place]} in row {place[0]}")


def check_lengths(where: str, lengths: Mapping[str, int]) -> int:
    """Return the number of steps; every key must have one row per step. The majority decides which one is wrong."""
    steps = collections.Counter(lengths.values()).most_common(1)[0][0]
    for label, length in lengths.items():
        if length != steps:
            others = ", ".join(other for other in lengths if lengths[other] == steps)
            raise ValueError(f"{where}: {label}: expected {steps} rows (as in {others}), found {length}")
    if steps < 1:
        raise ValueError(f"{where}: expected at least 1 step, found 0 steps. Leave empty episodes out.")
    return steps


def checked(where: str, record: Record) -> Record:
    """Return the record; raise unless every key has one row per step."""
    lengths = {part.label: len(part) for each in record.numbers.values() for part in each.parts}
    lengths |= {each.label: len(each) for each in record.pictures.values()}
    for label, values in {"rewards": record.rewards, "terminals": record.terminals}.items():
        if values is not None:
            lengths[label] = len(values)
    check_lengths(where, lengths)
    final: dict[str, Joined | Pictures] = {**record.final_pictures}
    if record.final_state is not None:
        final["state"] = record.final_state
    for key, last in final.items():
        like = record.pictures[key] if key in record.pictures else record.numbers[key]
        if len(last) != 1 or last.row_shape != like.row_shape:
            raise ValueError(
                f"{where}: {last.label}: expected 1 row of shape {like.row_shape} (as in {like.label}), found "
                f"{len(last)} of shape {last.row_shape}"
            )
    return record


Rows = TypeVar("Rows", Joined, Pictures)


def last_row(where: str, column: Rows, steps: int) -> Rows:
    """Pick the last row of a column, which must have one row for each of ``steps`` actions."""
    parts = column.parts if isinstance(column, Joined) else (column,)
    check_lengths(where, {"actions": steps} | {part.label: len(part) for part in parts})
    return column.pick(np.array([steps - 1]))


def text(where: str, name: str, value: Any) -> str:
    """Return an attribute as text. h5py returns invalid UTF-8 as surrogates, or as bytes if the length is fixed."""
    if not isinstance(value, str | bytes):
        raise ValueError(f"{where}: attribute {name}: expected text, found {files.one_line(reprlib.repr(value))}")
    try:
        return (value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{where}: attribute {name}: expected UTF-8 text ({error})") from error


KNOWN_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def flag(where: str, name: str, value: Any) -> bool | None:
    """Return an attribute as a flag. It may be a boolean, 0, 1, or one of these as text; None means unknown."""
    if value is None:
        return None
    plain = value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value
    word = text(where, name, plain).strip().lower() if isinstance(plain, str | bytes) else str(plain).lower()
    if word.removesuffix(".0") not in KNOWN_FLAGS:
        raise ValueError(f"{where}: {name}: expected true or false, found {files.one_line(reprlib.repr(value))}")
    return KNOWN_FLAGS[word.removesuffix(".0")]


def json_text(where: str, name: str, value: Any) -> dict[str, Any]:
    """Return the JSON object in an attribute; an absent attribute (None) gives an empty one."""
    if value is None:
        return {}
    return files.parse_json(text(where, name, value), f"{where}: attribute {name}", allow_nan=True)


@typed
def axis_angle(quaternions: Float[np.ndarray, "t 4"]) -> Float[np.ndarray, "t 3"]:
    """Return the rotation vectors of quaternions (x, y, z, w), with angles in 0..2 pi as in robosuite."""
    quaternions = quaternions.astype(np.float64)  # float32 would lose half the digits near 0 and pi
    w = np.clip(quaternions[:, 3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w**2)  # sine of half the angle
    still = sine < 1e-8
    scale = np.where(still, 0.0, 2.0 * np.arccos(w) / np.where(still, 1.0, sine))
    return quaternions[:, :3] * scale[:, None]
