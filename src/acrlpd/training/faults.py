"""Errors that end a run before its time, and their exit codes."""

EXIT_FAULT = 70  # sysexits.h: internal error; the run cannot go on, what was saved is intact
EXIT_INTERRUPTED = 75  # sysexits.h: temporary failure, try again; nothing is lost, resume
EXIT_KEYBOARD = 130  # 128 + SIGINT, as in shells; there was nothing to save


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal asked the run to stop, and the run has saved its state."""


class RunFault(RuntimeError):  # noqa: N818 (the message is for the user)
    """A fault that the run cannot repair. The message says what it is, which checkpoint is left, and what to do."""


class DataFault(RunFault):
    """A batch could not be made; the agent is not affected."""


class Diverged(RunFault):
    """Training diverged, and rolling back did not help."""
