"""Names of files that are still being written, and what becomes of those whose writer is no more.

A file that must be there whole or not at all is written beside its place and moved there. A process that is killed
meanwhile leaves it behind.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

HOST = platform.node() or "here"  # process ids mean nothing on another machine that shares the folder
NAME = re.compile(rf"\..+\.{re.escape(HOST)}-(\d+)\.tmp")


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be ``path``. Readers pass over hidden files."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Removes what killed processes of this machine left in ``folder``; other files, and other machines', stay."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp"):
        found = NAME.fullmatch(path.name)
        if found is not None and not _is_running(int(found[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process id at all
        return True
    return True
