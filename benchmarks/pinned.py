"""Training runs side by side, each on a core of its own, so that one's CPU seconds do not depend on the other."""

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
    """``acrlpd train`` into that directory; one that was begun goes on where it was stopped. Values as for a shell."""
    options = options | {"run_dir": shlex.quote(str(directory.parent)), "name": shlex.quote(directory.name)}
    words = [sys.executable, "-m", "acrlpd.cli.main", "train", preset]
    for option, value in options.items():
        words += [f"--{option}", *shlex.split(value)]
    return words + (["--resume"] if (directory / "config.json").exists() else [])


def is_finished(directory: Path) -> bool:
    """Whether the run is over. One that was interrupted has a summary too, which says so."""
    summary = directory / "summary.json"
    if not summary.exists():
        return False
    ended = json.loads(summary.read_text(encoding="utf-8")).get("ended")
    return ended is None or ended["reason"] in OVER


def run(commands: Sequence[list[str]], jobs: int) -> None:
    """All commands, ``jobs`` at a time. An interrupt reaches each of them: it saves, and the next call goes on."""
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
                    os.sched_setaffinity(running[core].pid, {core})  # before it counts the cores for its threads
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.wait()
