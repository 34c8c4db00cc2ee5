"""``acrlpd COMMAND``: find the command's module and turn user mistakes into one clear line."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import acrlpd
from acrlpd.files import cache_folder, printable
from acrlpd.training.faults import EXIT_FAULT, EXIT_KEYBOARD, RunFault

EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended
COMMANDS = {
    "train": "train a preset offline, then online; resume an interrupted run",
    "improve": "make a checkpoint better without changing its weights: critics, and a choice among samples",
    "serve": "answer openpi's clients over a websocket with a checkpoint's policy",
    "export": "write a trained agent for production: to serve, for XLA, for openpi's PyTorch port",
    "eval": "measure the success rate of a checkpoint, with its interval; or its actions beside recorded ones",
    "diagnose": "say why the loss falls and the robot fails: what a checkpoint expects, what the data has",
    "collect": "make prior data with a scripted expert",
    "report": "write one self-contained HTML page about a run",
    "weights": "list a checkpoint's arrays; convert between openpi's layout, PaliGemma, safetensors and npz",
    "data": "show what a data set holds and what is wrong with it; convert it; decode its pictures once",
    "config": "show, compare and save configurations",
    "list": "name the presets, environments, algorithms and robots that commands take",
    "doctor": "check that everything a run needs is installed and works",
    "plan": "compute parameters, memory and checkpoint size of a run before it starts",
    "norm-stats": "compute normalization statistics of a data set, in openpi's file",
}

USAGE = "usage: acrlpd COMMAND ...\n\n" + "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
HELP = f"""{USAGE}

acrlpd COMMAND --help explains a command; acrlpd --version prints the version.
A first run is `acrlpd train demo`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: done; 2: the user's mistake; 70: the run cannot go on; 75: interrupted and saved; 130: interrupted when there
    was nothing to save; 141: whoever read the output stopped reading.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_safely()
    logging.getLogger("acrlpd").setLevel(logging.INFO)
    if arguments in (["-V"], ["--version"], ["version"]):
        print(f"acrlpd {acrlpd.__version__}")
        return 0
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        return _fail(f"unknown command {command!r}{f': did you mean {near[0]!r}?' if near else ''}\n{USAGE}")
    _keep_compiled_programs()
    try:
        code: int = importlib.import_module(f"acrlpd.cli.{command.replace('-', '_')}").main(rest)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return EXIT_BROKEN_PIPE
    except (ValueError, ImportError, OSError, RunFault) as error:
        if os.environ.get("ACRLPD_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        return _fail(str(error) or type(error).__name__, EXIT_FAULT if isinstance(error, RunFault) else 2)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_KEYBOARD)
    return code


def _keep_compiled_programs() -> None:
    """Keep compiled programs on disk for later commands. ``JAX_COMPILATION_CACHE_DIR=`` switches this off."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _print_safely() -> None:
    """Escape characters that act on a terminal in logs and warnings, which repeat names and texts of data sets."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    warnings.formatwarning = lambda *args, **kwargs: printable(_formatwarning(*args, **kwargs))


_formatwarning = warnings.formatwarning


def _fail(message: str, code: int = 2) -> int:
    print(f"acrlpd: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
