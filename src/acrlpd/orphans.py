"""Worker processes end with the process that started them, however that process ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection

EXIT_ORPHANED = 1  # no parent is left to read it


def end_with_parent() -> None:
    """Let this worker of ``multiprocessing`` end as soon as its parent has ended; call it first in the worker.

    A thread waits for the end of a pipe that only the parent holds open: the system closes it when the parent ends,
    killed or not. The worker's current work is dropped, so it must leave no files of its own. In a process that
    ``multiprocessing`` did not start, nothing happens.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, args=(parent.sentinel,), name="acrlpd-parent", daemon=True).start()
