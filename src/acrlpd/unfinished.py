"""How a file or folder comes to its place whole, and what becomes of what it replaces and of writers that were killed.

What must be there whole or not at all is written beside its place and moved there; a process that is killed meanwhile
leaves it behind under a hidden name, which the next one removes. What is replaced is set aside under a name that can be
seen, and deleted last.
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
    """Whether some process writes or wrote what is not complete there."""
    return re.fullmatch(r"\..+\.tmp", path.name) is not None


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it, if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path of the same name, in a hidden folder beside ``path``, to write a file or folder to.

    When the block ends, that takes the place of ``path``; in an error it vanishes, and ``path`` is as it was.
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
    """Moves ``new`` to ``path``. A folder that is there is set aside first, and deleted last."""
    if path.is_symlink() or not path.is_dir():
        new.rename(path)  # takes a file's place at once
        return
    aside = set_aside(path)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    discard(aside)


def set_aside(path: Path) -> Path:
    """Renames ``path`` to a free name beside it and returns that."""
    names = (path.with_name(f"{path.name}.{ASIDE}{'' if count == 1 else f'-{count}'}") for count in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def those_set_aside(path: Path) -> list[Path]:
    """What was set aside in favour of ``path`` and is still there, by name."""
    pattern = re.compile(rf"{re.escape(path.name)}\.{ASIDE}(-\d+)?")
    if not path.parent.is_dir():
        return []
    return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))


def discard(path: Path) -> None:
    """Deletes a folder so that no half of it is ever seen under its name, whenever the process is killed."""
    doomed = temporary_path(path)
    remove(doomed)
    path.rename(doomed)
    remove(doomed)
