"""The benchmark of an accelerator runs where there is none, with small models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_every_part_measures_something():
    words = [sys.executable, str(SCRIPT), "--size", "small", "--batch", "2", "--repeats", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=900)
    parts = json.loads(done.stdout)["parts"]
    assert len(parts) == 6
    assert [part for part, found in parts.items() if "error" in found] == []
    rows = {part: found["rows"] for part, found in parts.items()}
    assert all(row["p50_s"] > 0 for part, found in rows.items() if part != "parity" for row in found)
    assert [row["chunk_difference"] for row in rows["parity"]] == [0, 0]  # the device is the CPU itself
