"""Worker processes end with the process that started them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection

EXIT_ORPHANED = 1  # nobody is left to read it


def end_with_parent() -> None:
    """Call first in a worker of ``multiprocessing``: the process ends as soon as its parent has.

    A thread waits for the end of a pipe that the parent alone holds open: the system closes it with the parent, killed
    or not. What the worker was doing is dropped, so it must leave no files of its own. In a process that
    ``multiprocessing`` did not start, nothing happens.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, args=(parent.sentinel,), name="acrlpd-parent", daemon=True).start()
