"""The files of a data set's folder, those behind links included."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Iterator

MAX_WAYS = 100  # to a folder: links to links make a maze of more ways than anybody can go


def files_below(path: str | os.PathLike[str]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every file below a folder (or the file itself) that is not hidden: its place below ``path``, and its status.

    Links to folders are followed. Places begin with a slash; that of a lone file is empty. The status is None where a
    link leads nowhere.

    Raises:
        ValueError: very many ways of links lead to one folder.
    """
    return _below(os.fspath(path), "", frozenset(), collections.Counter())


_Place = tuple[int, int]  # device and inode


def _below(
    path: str, name: str, above: frozenset[_Place], ways: collections.Counter[_Place]
) -> Iterator[tuple[str, os.stat_result | None]]:
    """``name`` and ``above`` are the way down so far: a link may lead back to a folder it lies in."""
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere; where it is an episode, its reader says so
        yield name, None
        return
    if not stat.S_ISDIR(status.st_mode):
        yield name, status
    elif (place := (status.st_dev, status.st_ino)) not in above:
        ways[place] += 1
        if ways[place] > MAX_WAYS:
            raise ValueError(f"{path}: more than {MAX_WAYS} ways of links lead to this folder. Remove some links.")
        with os.scandir(path) as found:
            for entry in found:
                if not entry.name.startswith("."):
                    yield from _below(entry.path, f"{name}/{entry.name}", above | {place}, ways)
