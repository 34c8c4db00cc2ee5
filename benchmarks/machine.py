"""Information on the machine, and timing and output, for all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax


def describe() -> dict[str, Any]:
    """Return the command, the machine and its load, which other programs may cause."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu_count": os.cpu_count(),
        "processor": _processor(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU time until the arrays that ``call`` returns are ready."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> dict[str, float]:
    """Return the median over the repeats, and the range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def show(result: dict[str, Any], *, as_json: bool, table: str) -> None:
    print(json.dumps(result, indent=2) if as_json else table)
