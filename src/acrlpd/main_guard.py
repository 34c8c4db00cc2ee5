"""A process that a script starts imports the script again: without a main guard, it would start processes too."""

from __future__ import annotations

import multiprocessing
import sys

MAINS = ("__mp_main__", "__main__")  # the script, in a process that it started and in its own
EXIT_NO_GUARD = 78  # the process would have started others while it was being started itself


def message() -> str:
    """Return what is wrong with the script, and what to do."""
    script = next((file for name in MAINS if (file := getattr(sys.modules.get(name), "__file__", None))), "the script")
    return (
        f"{script} starts processes, and each of them runs it again: put its code under `if __name__ == '__main__':`, "
        "or ask for no processes."
    )


def check(*, tell: bool = True) -> None:
    """End this process if it is still importing the script that started it; call it before starting others.

    ``tell`` prints the reason, for a process whose parent cannot see its exit code.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing checks this too
        return
    if tell:
        print(f"acrlpd: {message()}", file=sys.stderr)
    raise SystemExit(EXIT_NO_GUARD)
