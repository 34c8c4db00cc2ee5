"""A stop that loses nothing: SIGINT and SIGTERM finish the step under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 75  # "temporary failure, try again" in sysexits.h: nothing is lost, resume


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal asked the run to stop, and it has saved."""


class StopRequest:
    """Set by the first signal; a second one stops at once, the usual way."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request that a loop can look at between two steps."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in previous:
            signal.signal(number, handle)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
