"""The replay journal writes every finished online episode to disk before it is used, so that a crash loses none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from acrlpd import files
from acrlpd.data.formats import hdf5
from acrlpd.types import Episode

logger = logging.getLogger(__name__)

INDEX = "journal.jsonl"
LATER = "later"  # folder of episodes that were collected after the step to which the run went back


class Entry(NamedTuple):
    """One line of the index."""

    number: int
    file: str
    length: int
    success: bool | None
    sha256: str


class ReplayJournal:
    """An append-only folder of episode files, with one index line per file. Only one process may write to it.

    The file is written first, then its line, and each is forced to the disk. A crash can therefore leave behind half an
    index line, or a complete file without a line, which then gets one. A missing or damaged index is rebuilt from the
    files. A file that cannot be read, has a wrong checksum or holds an episode that is already there is moved to
    ``damaged/`` with a warning.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._entries = self._recover_index()
        self._next_number = 1 + max((entry.number for entry in self._entries), default=-1)

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, episode: Episode, metadata: dict[str, Any] | None = None) -> int:
        """Write the episode, then its index line; return its number."""
        number = self._next_number
        path = hdf5.write_episode(hdf5.episode_path(self.directory, number), episode, metadata)
        entry = Entry(number, path.name, len(episode), episode.success, _sha256(path))
        with self._index.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self._entries.append(entry)
        self._next_number = number + 1
        return number

    def metadata(self) -> list[dict[str, Any]]:
        """Return the metadata that ``append`` received with each episode."""
        return [hdf5.read_metadata(self.directory / entry.file) for entry in self._entries]

    def numbers(self) -> list[int]:
        """Return the numbers of the episodes in the index."""
        return [entry.number for entry in self._entries]

    def load(self, check: Callable[[Mapping[Entry, str]], None] = lambda damaged: None) -> Iterator[Episode]:
        """Yield the intact episodes one at a time, oldest first: together they need not fit into memory.

        At the end ``check`` receives the damaged entries with the reasons. Unless it raises, their files are set aside.
        """
        damaged: dict[Entry, str] = {}
        for entry in self._entries:
            reason = self._damage(entry)
            if reason is None:
                yield hdf5.read_episode(self.directory / entry.file)
            else:
                damaged[entry] = reason
        check(damaged)
        if damaged:
            self._entries = [entry for entry in self._entries if entry not in damaged]
            self._write_index(self._entries)
        for entry, reason in damaged.items():
            self._set_aside(entry.file, reason)

    def set_aside_from(self, number: int) -> None:
        """Move the episodes from this number on to ``later/``: the run goes back to a step before they were made."""
        later = [entry for entry in self._entries if entry.number >= number]
        if not later:
            return
        self._entries = [entry for entry in self._entries if entry.number < number]
        self._write_index(self._entries)
        self._next_number = number
        for entry in later:
            if (self.directory / entry.file).is_file():
                os.replace(self.directory / entry.file, self._free_name(entry.file, LATER))
        logger.warning("%d episodes of later steps were set aside: %s", len(later), self.directory / LATER)

    @property
    def next_number(self) -> int:
        """The number that the next episode will get."""
        return self._next_number

    @property
    def _index(self) -> Path:
        return self.directory / INDEX

    def _damage(self, entry: Entry) -> str | None:
        path = self.directory / entry.file
        if not path.is_file():
            return "the index names it, but it is missing"
        found = _sha256(path)
        return None if found == entry.sha256 else f"expected sha256 {entry.sha256}, found {found}: it has changed"

    def _recover_index(self) -> list[Entry]:
        if self._index.exists() and not self._index.is_file():
            raise ValueError(
                f"{self._index}: expected the journal's index, found something that is not a regular file. Move it "
                "away; the index will be rebuilt from the episodes."
            )
        files.remove_abandoned(self.directory)
        lines = self._index.read_bytes().splitlines(keepends=True) if self._index.is_file() else []
        found: dict[int, Entry] = {}
        broken = b""
        for line in lines:
            entry = _parse(line)
            if entry is None or entry.number in found:
                broken += line
            else:
                found[entry.number] = entry
        entries = list(found.values())
        known = {entry.file for entry in entries}
        there = [path.name for path in sorted(self.directory.iterdir()) if path.suffix in hdf5.SUFFIXES]
        strays = [name for name in there if name not in known]
        if broken:
            self._keep_broken_lines(broken)
        adopted = self._adopted(strays, entries) if strays else []
        entries = sorted(entries + adopted, key=lambda entry: entry.number)
        if broken or adopted:
            self._write_index(entries)
        if adopted:
            warnings.warn(
                f"{self._index}: no line for {_shown([entry.file for entry in adopted])}: made anew from those files. "
                "Changes of their numbers since they were written can no longer be detected.",
                stacklevel=3,
            )
        return entries

    def _adopted(self, names: list[str], known: list[Entry]) -> list[Entry]:
        """Make entries for episode files that the index lacks. Files that cannot get one are moved to ``damaged/``."""
        adopted: list[Entry] = []
        there = {mark: entry.file for entry in known for mark in self._marks(entry)}
        for name in names:
            try:
                entry = self._entry_of(name)
                twins = [there[mark] for mark in self._marks(entry) if mark in there]
                if twins:
                    raise ValueError(f"its episode is there already, as {twins[0]}")
            except (ValueError, OSError) as error:
                self._set_aside(name, f"{INDEX} has no line for it, and it can get none ({error})")
                continue
            there |= dict.fromkeys(self._marks(entry), name)
            adopted.append(entry)
        return adopted

    def _entry_of(self, name: str) -> Entry:
        path = self.directory / name
        number = hdf5.episode_number(path)
        if number is None or path != hdf5.episode_path(self.directory, number):
            raise ValueError("not the name of an episode of this journal")
        episode = hdf5.read_episode(path)
        return Entry(number, name, len(episode), episode.success, _sha256(path))

    def _marks(self, entry: Entry) -> list[Any]:
        """Return what identifies an episode under any file name: its checksum and the number its collector gave it."""
        try:
            return [entry.sha256, hdf5.read_metadata(self.directory / entry.file)["episode"]]
        except (ValueError, OSError, KeyError):  # damaged, which is reported when it is loaded; or without a collector
            return [entry.sha256]

    def _write_index(self, entries: list[Entry]) -> None:
        with files.written_whole(self._index) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(entry) for entry in entries)

    def _keep_broken_lines(self, lines: bytes) -> None:
        target = self._free_name(INDEX)
        target.write_bytes(lines)
        warnings.warn(f"{self._index}: lines that are not a complete entry were moved to {target}", stacklevel=2)

    def _set_aside(self, name: str, reason: str) -> None:
        source, target = self.directory / name, self._free_name(name)
        if source.is_file():
            os.replace(source, target)
        warnings.warn(f"{source}: {reason}. Left out; its file, if any, is now in {target.parent}.", stacklevel=2)

    def _free_name(self, name: str, folder_name: str = "damaged") -> Path:
        """Return a path in that folder that does not exist yet."""
        folder = self.directory / folder_name
        folder.mkdir(exist_ok=True)
        names = (folder / (name if count == 0 else f"{count}-{name}") for count in range(10**6))
        return next(path for path in names if not path.exists())


def _line(entry: Entry) -> str:
    """Return an entry as a line of the index, with a checksum of the line."""
    content = entry._asdict()
    return json.dumps({**content, "check": zlib.crc32(json.dumps(content).encode())}) + "\n"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _parse(line: bytes) -> Entry | None:
    """Return the entry in a line, or None if it holds none. A line without a newline is incomplete, so it has none."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = files.parse_json(line, INDEX)
        check = content.pop("check", None)  # earlier versions wrote lines without it
        entry = Entry(**content)
    except (ValueError, TypeError):  # no JSON, or JSON of another form
        return None
    if check is not None and line.decode() != _line(entry):
        return None
    kinds = (type(entry.number), type(entry.length), type(entry.sha256))
    good = kinds == (int, int, str) and entry.success in (None, True, False)
    return entry if good and entry.file == hdf5.episode_path("", entry.number).name else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
