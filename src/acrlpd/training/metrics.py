"""Records of a run: one JSON object per line, and means of the numbers of many updates."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from acrlpd import files


class JsonlWriter:
    """A file with one JSON object per line. Each line is flushed when written, so a killed run keeps its curve."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # half a line, left by a kill, would spoil the first line of a resumed run
            files.check_file(path)
            whole = path.read_bytes()
            os.truncate(path, whole.rfind(b"\n") + 1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the life of a run)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, default=_plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return all complete records; half a line at the end, left by a kill, is dropped."""
    return [
        files.parse_json(line, where, allow_nan=True) for where, line in files.read_lines(path) if line.endswith("\n")
    ]


COUNTERS = ("step", "env_steps", "wall_s")  # names in every line that a run writes


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``; raise ValueError for one that no run wrote."""
    records = read_jsonl(path)
    for number, record in enumerate(records, 1):
        numbers = {name: record.get(name) for name in COUNTERS} | {k: v for k, v in record.items() if "/" in k}
        wrong = [name for name, value in numbers.items() if not isinstance(value, int | float)]
        if wrong:
            raise ValueError(
                f"{path}, line {number}: {wrong[0]}: expected a number, found {numbers[wrong[0]]!r:.100}. No run wrote "
                "this line: remove it."
            )
    return records


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write beside the target and rename: a reader sees the old file or the new one, even after a loss of power."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


class MetricAverage:
    """Means of device scalars, or of arrays of them for several updates, between two log points.

    Nothing is computed or fetched before ``fetch``.
    """

    def __init__(self) -> None:
        self._records: list[Mapping[str, Any]] = []

    def add(self, metrics: Mapping[str, Any]) -> None:
        self._records.append(metrics)

    def fetch(self) -> dict[str, float]:
        """Wait for the device once, return means, start anew. Values not finite (of skipped updates) are left out."""
        values: dict[str, list[float]] = {}
        for record in jax.device_get(self._records):
            for name, value in record.items():
                values.setdefault(name, []).extend(np.ravel(value).tolist())
        self._records = []
        finite = {name: np.asarray(each)[np.isfinite(each)] for name, each in values.items()}
        return {name: float(np.mean(each)) if len(each) else math.nan for name, each in finite.items()}
