"""Parallel training runs, each on its own core, so that the CPU seconds of one do not depend on the others."""

from __future__ import annotations

import collections
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from acrlpd.training.ending import OVER


def command(preset: str, directory: Path, options: dict[str, str]) -> list[str]:
    """Return the ``acrlpd train`` command of a run; an existing run is resumed. Options are quoted as in a shell."""
    options = options | {"run_dir": shlex.quote(str(directory.parent)), "name": shlex.quote(directory.name)}
    words = [sys.executable, "-m", "acrlpd.cli.main", "train", preset]
    for option, value in options.items():
        words += [f"--{option}", *shlex.split(value)]
    return words + (["--resume"] if (directory / "config.json").exists() else [])


def is_finished(directory: Path) -> bool:
    """Return whether the run is over. An interrupted run has a summary, too, which says so."""
    summary = directory / "summary.json"
    if not summary.exists():
        return False
    ended = json.loads(summary.read_text(encoding="utf-8")).get("ended")
    return ended is None or ended["reason"] in OVER


def run(commands: Sequence[list[str]], jobs: int) -> None:
    """Run all commands, ``jobs`` at a time. An interrupt reaches each one: it saves, and the next call resumes it."""
    waiting = collections.deque(commands)
    running: dict[int, subprocess.Popen[bytes]] = {}
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    try:
        while waiting or running:
            for core in cores:
                if core in running and (code := running[core].poll()) is not None:
                    if code:
                        raise RuntimeError(f"{running[core].args!r} ended with {code}")
                    del running[core]
                if core not in running and waiting:
                    running[core] = subprocess.Popen(waiting.popleft(), stdout=sys.stderr)
                    os.sched_setaffinity(running[core].pid, {core})  # before it counts cores to size its thread pools
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.wait()
