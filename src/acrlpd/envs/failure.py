"""Errors of worker processes, sent back as text and raised again here.

The exception itself cannot always be sent: its class may be unknown here, may take other arguments than a message, or
may hold objects that cannot be pickled.
"""

from __future__ import annotations

import dataclasses
import traceback
from typing import Any

MISTAKES: tuple[type[Exception], ...] = (ValueError, ImportError, OSError)  # shown to users without a traceback


class WorkerError(RuntimeError):
    """An exception of any other class, raised in a worker."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An exception as text; ``checked`` raises it again."""

    kind: str  # the name of its class
    mistake: str  # which of MISTAKES it is; empty: none
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception as text, even one whose own ``str`` fails."""
        told = traceback.TracebackException.from_exception(error)
        mistake = next((known.__name__ for known in MISTAKES if isinstance(error, known)), "")
        return cls(type(error).__name__, mistake, str(told), "".join(told.format()))

    def error(self) -> Exception:
        """Return the exception to raise here, with the other process's traceback as a note."""
        made = next((known for known in MISTAKES if known.__name__ == self.mistake), WorkerError)
        found = made(self.message if self.kind == self.mistake else f"{self.kind}: {self.message}")
        found.add_note(f"In a worker process:\n{self.traceback}")
        return found


def checked(answer: Any) -> Any:
    """Return the answer of another process; raise its error if it is a ``Failure``."""
    if isinstance(answer, Failure):
        raise answer.error()
    return answer
