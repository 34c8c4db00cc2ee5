"""Whole-or-nothing writing of files and folders, safe replacement of old ones, and removal of what killed writers left.

What must be complete or absent is written beside its place and then moved there. A process that is killed meanwhile
leaves a hidden file or folder, which the next writer removes. What is replaced is first set aside under a visible name
and deleted last.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from acrlpd.files import remove_abandoned, temporary_path

ASIDE = "overwritten"  # NAME.overwritten, NAME.overwritten-2, ...


def is_temporary(path: Path) -> bool:
    """Return whether ``path`` has the name of unfinished work of a process, running or killed."""
    return re.fullmatch(r"\..+\.tmp", path.name) is not None


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with its content, if it exists and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path of the same name, in a hidden folder beside ``path``, to write a file or folder to.

    When the block ends, the new content replaces ``path``; on an error it is deleted, and ``path`` is unchanged.
    """
    remove_abandoned(path.parent)
    temporary = temporary_path(path)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary / path.name
        replace(temporary / path.name, path)
    finally:
        remove(temporary)


def replace(new: Path, path: Path) -> None:
    """Move ``new`` to ``path``. A folder that is already there is set aside first and deleted last."""
    if path.is_symlink() or not path.is_dir():
        new.rename(path)  # replaces a file atomically
        return
    aside = set_aside(path)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    discard(aside)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to a free name beside it, and return the new path."""
    names = (path.with_name(f"{path.name}.{ASIDE}{'' if count == 1 else f'-{count}'}") for count in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def those_set_aside(path: Path) -> list[Path]:
    """Return what was set aside in favour of ``path`` and still exists, sorted by name."""
    pattern = re.compile(rf"{re.escape(path.name)}\.{ASIDE}(-\d+)?")
    if not path.parent.is_dir():
        return []
    return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))


def discard(path: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its name, even if the process is killed."""
    doomed = temporary_path(path)
    remove(doomed)
    path.rename(doomed)
    remove(doomed)
