"""The README's table: the demo for several seeds, each a run of its own with its own prior data.

    python benchmarks/demo_seeds.py --seeds 0 1 2 [--preset demo] [--json]

A run that has finished before is read, not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run_dir", default="runs/seeds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    runs = {seed: run(arguments.preset, seed, Path(arguments.run_dir)) for seed in arguments.seeds}
    machine.show({**about, "runs": runs}, as_json=arguments.json, table=table(runs))


def run(preset: str, seed: int, run_dir: Path) -> dict:
    name = f"{preset}-seed{seed}"
    summary = run_dir / name / "summary.json"
    if not summary.exists():
        command = ["train", preset, "--seed", str(seed), "--name", name, "--run_dir", str(run_dir), "--overwrite"]
        subprocess.run([sys.executable, "-m", "acrlpd.cli.main", *command], check=True, stdout=sys.stderr)
    return json.loads(summary.read_text(encoding="utf-8"))


def table(runs: dict[int, dict]) -> str:
    columns = ("seed", "BC", "after offline", "after online", "updates", "environment steps", "minutes", "overhead")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for seed, summary in runs.items():
        phases = " | ".join(interval(summary["phases"][phase]) for phase in ("bc", "offline", "online"))
        outside = summary["breakdown"]["outside_share"]
        lines.append(
            f"| {seed} | {phases} | {summary['updates']} | {summary['env_steps']} | {summary['wall_s'] / 60:.1f} "
            f"| {outside:.1%} |"
        )
    return "\n".join(lines)


def interval(phase: dict) -> str:
    return f"{phase['successes']}/{phase['episodes']} [{phase['low']:.0%}, {phase['high']:.0%}]"


if __name__ == "__main__":
    main()
