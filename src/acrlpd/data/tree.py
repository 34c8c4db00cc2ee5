"""The files of a data set's folder, those behind links included."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator


def files_below(
    path: str | os.PathLike[str], name: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every file below a folder (or the file itself) that is not hidden: its place below ``path``, and its status.

    Links to folders are followed. Places begin with a slash; that of a lone file is empty. The status is None where a
    link leads nowhere. ``name`` and ``above`` are the way down so far: a link may lead back to a folder it lies in.
    """
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere; where it is an episode, its reader says so
        yield name, None
        return
    if not stat.S_ISDIR(status.st_mode):
        yield name, status
    elif (place := (status.st_dev, status.st_ino)) not in above:
        with os.scandir(path) as found:
            for entry in found:
                if not entry.name.startswith("."):
                    yield from files_below(entry.path, f"{name}/{entry.name}", above | {place})
