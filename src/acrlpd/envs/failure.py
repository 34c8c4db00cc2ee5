"""An error of another process as text.

The exception itself may not survive the way: its class may be unknown here, take other arguments than its message, or
hold what cannot be sent.
"""

from __future__ import annotations

import dataclasses
import traceback

MISTAKES: tuple[type[Exception], ...] = (ValueError, ImportError, OSError)  # told to users without a traceback


class WorkerError(RuntimeError):
    """An exception of any other class, raised in a worker."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is known of an exception."""

    kind: str  # the name of its class
    mistake: str  # which of MISTAKES it is; empty: none
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Put an exception into words; one that has none of its own is told, too."""
        told = traceback.TracebackException.from_exception(error)
        mistake = next((known.__name__ for known in MISTAKES if isinstance(error, known)), "")
        return cls(type(error).__name__, mistake, str(told), "".join(told.format()))

    def error(self) -> Exception:
        """Return the exception to raise here, with the other process's traceback as a note."""
        made = next((known for known in MISTAKES if known.__name__ == self.mistake), WorkerError)
        found = made(self.message if self.kind == self.mistake else f"{self.kind}: {self.message}")
        found.add_note(f"In a worker process:\n{self.traceback}")
        return found
