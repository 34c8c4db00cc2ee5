"""Worker processes that read and decode, started in a way that is safe with JAX's threads."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from acrlpd import main_guard
from acrlpd.orphans import end_with_parent


def start(num_workers: int, prepare: Callable[..., None], *arguments: Any) -> concurrent.futures.ProcessPoolExecutor:
    """Start a pool in which each process first calls ``prepare``. A script that uses it needs a ``__main__`` guard.

    Processes are not forked: a forked process would inherit locks of the caller's JAX threads.
    """
    main_guard.check()
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    return concurrent.futures.ProcessPoolExecutor(num_workers, context, _begin, (prepare, *arguments))


def _begin(prepare: Callable[..., None], *arguments: Any) -> None:
    """Initialize a worker. It ignores Ctrl-C, which a terminal sends to all processes: the parent handles it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare(*arguments)


@contextmanager
def explained(num_workers: int) -> Iterator[None]:
    """Explain the death of a worker process during a pool's work: the process itself reports nothing."""
    try:
        yield
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {num_workers} reading processes died: for lack of memory, or because the script that started them "
            "has no `if __name__ == '__main__':` around its code. Use fewer of them, or none."
        ) from error
