"""A cache on disk of what opening a data set finds out: the second opening reads one file instead of every episode.

An entry is a ``.safetensors`` file of numbers, flags and JSON texts. It is mapped into memory and read once as a whole,
for its checksum. Arrays that ``flat.FlatRows`` holds in a file get files of their own, in a folder that the entry
names. An entry is valid for one path, one set of options and one state of the files (name, size, times and identity of
each). In any other case, or if the entry is damaged, the data set is read again. An entry has a checksum; the files of
large arrays have none, and only their sizes and headers are checked. Entries may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import re
import shutil
import time
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from acrlpd.data.store import flat
from acrlpd.data.store.tree import files_below
from acrlpd.files import cache_folder, written_whole

logger = logging.getLogger(__name__)

VERSION = 7  # version of the entries' content; raise it when readers store something else

STALE_S = 24 * 3600  # age at which a folder that no entry names is removed; a younger one may be about to be named
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged entry raises

Arrays = dict[str, np.ndarray]


def pack(content: Any) -> np.ndarray:
    """Return ``content`` as JSON in an array of bytes."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def unpack(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


@dataclasses.dataclass(frozen=True)
class MetadataCache:
    """The entries in ``folder``, one per data set and choice of options."""

    folder: Path = dataclasses.field(default_factory=lambda: cache_folder("metadata"))

    def get(self, path: Path, asked: object, find_out: Callable[[], Arrays]) -> Arrays:
        """Return what ``find_out`` returned for this state of the files under ``path``.

        ``asked`` (by its ``repr``) is everything else that the result depends on. Warnings are repeated each time.
        """
        files = fingerprint(path, in_place=True)
        entry = self.entry_path(path, asked)
        found = _read(entry, files)
        if found is not None:
            for text in found[1]:
                warnings.warn(text, stacklevel=4)
            return found[0]
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                arrays = find_out()
        finally:
            told = [str(warning.message) for warning in caught]
            for text in told:
                warnings.warn(text, stacklevel=4)
        _write(entry, files, arrays, told)
        found = _read(entry, files)
        return arrays if found is None else found[0]

    def entry_path(self, path: Path, asked: object) -> Path:
        """Return the file of an entry, there or not. The spelling of ``path`` counts, because messages contain it."""
        text = f"{path}\n{path.resolve()}\n{asked!r}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def fingerprint(path: Path, *, in_place: bool = False) -> str:
    """Return a hash of name, size and time of all files that are not hidden; a copy that keeps times has the same one.

    With ``in_place`` it also changes if another file of equal size and time takes a file's place, and in any copy.
    """
    digest = hashlib.sha256()
    for name, status in sorted(files_below(path), key=lambda file: file[0]):
        facts = [-1, -1] if status is None else [status.st_size, status.st_mtime_ns]
        if in_place and status is not None:
            facts += [status.st_ino, status.st_ctime_ns]
        digest.update("\0".join([name, *map(str, facts)]).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _read(entry: Path, files: str) -> tuple[Arrays, list[str]] | None:
    """Return the arrays and warnings of an entry; None if it does not exist, is damaged or is about other files."""
    if not entry.is_file():
        return None
    try:
        content, start, header = _opened(entry)
        facts = header.pop("__metadata__")
        if facts["version"] != str(VERSION) or facts["files"] != files:
            return None
        arrays = {key: _mapped(content, start, **about) for key, about in header.items()}
        if facts.pop("checksum") != _checksum(arrays, facts):
            raise ValueError("its checksum is wrong")
        for key, (dtype, shape) in json.loads(facts["flat"]).items():
            arrays[key] = flat.open_mapped(entry.parent / facts["folder"] / f"{key}.npy", tuple(shape), np.dtype(dtype))
        return arrays, json.loads(facts["warnings"])
    except DAMAGED as error:
        logger.warning("metadata cache: %s is damaged (%s) and is made anew", entry, error)
        return None


def _opened(entry: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """Map an entry; return it, where its arrays start, and its header. A damaged one raises one of ``DAMAGED``."""
    with entry.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    return content, start, json.loads(content[8:start])


def _mapped(content: mmap.mmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    kind = {"U": "u", "I": "i", "F": "f", "B": "?"}[dtype[0]]  # as in U8, BOOL
    return np.ndarray(shape, kind if kind == "?" else f"<{kind}{int(dtype[1:]) // 8}", content, start + data_offsets[0])


def _write(entry: Path, files: str, arrays: Arrays, told: list[str]) -> None:
    """Write the whole entry or nothing. If there is no room for it, the next opening takes as long as this one."""
    large = {key: array for key, array in arrays.items() if flat.is_mapped(array)}
    arrays = {key: array for key, array in arrays.items() if key not in large}
    facts = {"version": str(VERSION), "files": files, "warnings": json.dumps(told)}
    facts |= {"flat": json.dumps({key: (array.dtype.str, array.shape) for key, array in large.items()})}
    facts |= {"folder": f"{entry.stem}-{uuid.uuid4().hex[:8]}"}  # another process may be making the same entry
    folder = entry.parent / facts["folder"]
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        if large:
            _write_flat(folder, large)
        try:
            with written_whole(entry) as temporary:
                save_file(arrays, temporary, metadata=facts | {"checksum": _checksum(arrays, facts)})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _remove_unnamed(entry.parent)
    except (OSError, SafetensorError) as error:
        logger.warning("metadata cache: %s cannot be written (%s); opening will take as long next time", entry, error)


def _remove_unnamed(cache: Path) -> None:
    """Remove old folders of arrays that no entry names: the entry was replaced or deleted, or a process was killed."""
    for folder in list(cache.iterdir()):
        found = re.fullmatch(r"([0-9a-f]{32})-[0-9a-f]{8}", folder.name)
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if found and time.time() - folder.stat().st_mtime > STALE_S and _named(cache, found[1]) != folder.name:
                shutil.rmtree(folder, ignore_errors=True)


def _named(cache: Path, stem: str) -> str | None:
    """Return the name of the folder that an entry names; None if there is no such entry, or a damaged one."""
    try:
        _, _, header = _opened(cache / f"{stem}.safetensors")
        return str(header["__metadata__"]["folder"])
    except DAMAGED:
        return None


def _write_flat(folder: Path, arrays: Arrays) -> None:
    """Write the folder with all arrays, or nothing."""
    with written_whole(folder) as temporary:
        temporary.mkdir()
        for key, array in arrays.items():
            flat.write(temporary / f"{key}.npy", array)


def _checksum(arrays: Arrays, facts: dict[str, str]) -> str:
    """Return a checksum of an entry: its facts, and the names, dtypes, shapes and numbers of its arrays."""
    outlines = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    checksum = zlib.crc32(json.dumps([facts, outlines], sort_keys=True).encode())
    for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return str(checksum)
