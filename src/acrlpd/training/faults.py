"""How a run may end before its time, and the exit code that says so."""

EXIT_FAULT = 70  # sysexits.h: internal error; the run cannot go on, what was saved is intact
EXIT_INTERRUPTED = 75  # sysexits.h: temporary failure, try again; nothing is lost, resume
EXIT_KEYBOARD = 130  # 128 + SIGINT, as shells have it; there was nothing to save


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal asked the run to stop, and it has saved."""


class RunFault(RuntimeError):  # noqa: N818 (the message is for the user)
    """Something the run cannot mend. The message says what, which checkpoint is left, and what to do."""


class DataFault(RunFault):
    """A batch could not be made: the agent is as good as before."""


class Diverged(RunFault):
    """Rolling back did not help."""
