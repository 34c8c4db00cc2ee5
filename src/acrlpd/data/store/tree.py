"""The files in a data set's folder, including those behind links."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Iterator

MAX_WAYS = 100  # max number of paths to a folder; links to links can make very many


def files_below(path: str | os.PathLike[str]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield every file below a folder (or the file itself) that is not hidden: its place below ``path``, its status.

    Links to folders are followed. Places begin with a slash; the place of ``path`` itself is empty. The status of a
    broken link is None.

    Raises:
        ValueError: more than ``MAX_WAYS`` paths of links lead to one folder.
    """
    return _below(os.fspath(path), "", frozenset(), collections.Counter())


_Place = tuple[int, int]  # device and inode


def _below(
    path: str, name: str, above: frozenset[_Place], ways: collections.Counter[_Place]
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the files. ``name`` and ``above`` are the path so far: a link may lead back to a folder above it."""
    try:
        status = os.stat(path)
    except OSError:  # a broken link; if it should be an episode, its reader reports it
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
