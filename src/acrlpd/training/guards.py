"""Guards against what can happen to a run, so that it ends without losing work.

They cover signals, a second process on the same folder, a full disk, files that are gone, and numbers that explode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from acrlpd.agents.config import AgentConfig
from acrlpd.training.faults import RunFault
from acrlpd.training.metrics import JsonlWriter
from acrlpd.types import ChunkBatch

LOCK_FILE = "lock"


class RunLock:
    """The lock that allows one process per run folder. The system frees it when the process ends, however it ends."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(directory / LOCK_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held open for the run)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"run directory {directory} is in use by {owner}. Stop that run first, or choose another --name."
            ) from None
        self._file.truncate(0)
        now = dt.datetime.now().isoformat(sep=" ", timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


@contextlib.contextmanager
def explain_storage(directory: Path) -> Iterator[None]:
    """End the run with advice on what to do if the system refuses a write (disk full, quota, read-only, gone).

    Other errors of the system, such as a network error of a logger, are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if not is_of_storage(error, directory):
            raise
        raise RunFault(
            f"{directory} cannot be written: {error}. Everything up to the last checkpoint is intact: make room or "
            "restore the folder, then use --resume."
        ) from error


STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # raised for an open file, without its name
FILE_ERRORS = STORAGE_ERRORS | {errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


def is_of_storage(error: Exception, directory: Path) -> bool:
    """Return whether ``directory`` cannot be written. If the error names a file, the file must belong there."""
    if not isinstance(error, OSError):
        return False
    if not isinstance(error.filename, (str, os.PathLike)):
        return error.errno in STORAGE_ERRORS
    file, folder = (Path(os.path.abspath(path)) for path in (error.filename, directory))
    return error.errno in FILE_ERRORS and file.is_relative_to(folder)


@contextlib.contextmanager
def if_out_of_memory(lighten: Callable[[str], None]) -> Iterator[None]:
    """Call ``lighten`` with the compiler's or device's message if the block needs more memory than there is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lighten(str(error).splitlines()[0])


def lighter(config: AgentConfig, batch_size: int, num_devices: int) -> AgentConfig | None:
    """Return what to try next: candidates in blocks, then a batch in twice as many pieces; None: nothing is left."""
    if config.best_of_n_strategy in ("parallel", "auto") and config.candidates_in_target > config.best_of_n_block:
        return dataclasses.replace(config, best_of_n_strategy="chunked")
    parts = 2 * config.gradient_accumulation_steps
    if batch_size % parts or batch_size // parts < num_devices:
        return None
    return dataclasses.replace(config, gradient_accumulation_steps=parts)


class SkippedUpdates:
    """Record of the updates that the agent refused and their rows; read only at log points, so nothing waits for it."""

    def __init__(self, file: Path, *, limit: int):
        self._file = file
        self._limit = limit
        self._recent: list[tuple[int, list[dict[str, Any]], dict[str, Any]]] = []

    def watch(self, step: int, batches: Sequence[ChunkBatch], metrics: Mapping[str, Any]) -> None:
        """Note one call's updates from ``step`` on, with batches as the host made them; only small arrays are kept."""
        ids = [{"episode_id": each.episode_id, "step_id": each.step_id} for each in batches]
        self._recent.append((step, ids, {name: metrics[name] for name in ("skipped", "skipped_in_a_row")}))

    def settle(self) -> int | None:
        """Write down what was skipped since the last call; return the first update of too long a series, or None."""
        recent, self._recent = self._recent, []
        start = None
        for first, ids, health in jax.device_get(recent):
            for step, each in enumerate(ids, first):
                skipped, in_a_row = (np.ravel(health[name])[step - first] for name in ("skipped", "skipped_in_a_row"))
                if not skipped:
                    continue
                self._write({"step": step, "in_a_row": int(in_a_row)} | {key: x.tolist() for key, x in each.items()})
                if in_a_row >= self._limit:
                    start = step - int(in_a_row) + 1
        return start

    def _write(self, record: Mapping[str, Any]) -> None:
        writer = JsonlWriter(self._file)
        writer.write(record)
        writer.close()


HELD_BACK_S = 3.0  # a scheduler or a terminal may send a signal twice


class StopRequest:
    """A request that the first SIGINT or SIGTERM sets. Later ones do nothing, except Ctrl-C after ``HELD_BACK_S``."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            _tell(f"{self.signal_name}: stops and saves. Ctrl-C after {HELD_BACK_S:g} s ends at once, without saving.")
        elif number == signal.SIGINT and time.monotonic() - self._since > HELD_BACK_S:
            _tell("Ctrl-C once more: ends at once. The last complete checkpoint is intact.")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _tell(text: str) -> None:
    """Write to the terminal from a signal's handler, which may have interrupted another writer."""
    with contextlib.suppress(OSError):  # nobody reads the terminal any more
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that a loop can check between two steps."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals only to the main thread
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
