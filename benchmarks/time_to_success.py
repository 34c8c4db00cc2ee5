"""Measure CPU seconds to 80 % success on OGBench's play data, with Q-chunking's recipe and ours in one framework.

    python benchmarks/time_to_success.py [--methods qc ours] [--seeds 0 1 2] [--jobs 2] [--json]

The task is ``cube-single``, task 1: 100 episodes of play (100,000 transitions, generated first by ``play_data.py``),
then an online phase with one update per step; networks are 2 x 256. Each run has one core. Online, 50 episodes are
evaluated every 2000 updates; the first evaluation with at least 80 % ends the run. CPU seconds include compilation and
simulator, but not the evaluations. Finished runs are read; the section of docs/results.md is written from all of them.

qc: best of 8 with five Euler steps, also in the target, batch 128, learning rate 1e-3, tau 0.02, uniform sampling of
rows, without chunks that an episode's end cuts short, 12,000 updates offline. ours: ``--algorithm lean-cheap`` at
the same sizes and rates, 8000 updates offline; it was chosen on seed 0 of this task.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import machine
import pinned
import play_data
import results

from acrlpd.training.metrics import read_jsonl

SUCCESS = 0.8
EQUAL_UPDATES = 8000  # offline updates after which both methods are evaluated
COMMON = {
    "env.name": "ogbench/cube-single-play-singletask-task1-v0",
    "data.cube_goal": "0.425 -0.1 0.02",  # task 1's goal in m
    "policy.kind": "mlp_flow",
    "policy.hidden_dims": "256 256",
    "agent.critic.hidden_dims": "256 256",
    "agent.best_of_n_samples": "8",
    "agent.flow_steps": "5",
    "agent.target_update_tau": "0.02",
    "data.batch_size": "128",
    "online_steps": "30000",
    "utd_ratio": "1",
    "online_envs": "1",
    "eval.frequency": "4000",  # online, evaluations are twice as frequent
    "eval.progress_episodes": "50",
    "early_stopping_success": str(SUCCESS),
    "early_stopping_patience": "1000",
    "save_frequency": "100000",
}
METHODS = {
    "qc": {"algorithm": "qc", "offline_steps": "12000"},
    "ours": {"algorithm": "lean-cheap", "offline_steps": "8000"},
}
HEADING = "Time to success on play data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own core")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/time_to_success"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    data = arguments.run_dir / "cube-single-play-100k.npz"
    if not data.exists():
        play_data.write(data, episodes=100, seed=101)
    wanted = [(method, seed) for seed in arguments.seeds for method in arguments.methods]
    commands = []
    for method, seed in wanted:
        directory = folder(arguments.run_dir, method, seed)
        options = COMMON | METHODS[method] | {"data.path": shlex.quote(str(data)), "seed": str(seed)}
        commands += [] if pinned.is_finished(directory) else [pinned.command("demo-cube", directory, options)]
    pinned.run(commands, arguments.jobs)
    rows = [row(folder(arguments.run_dir, *each), *each) for each in wanted]
    text = document(rows, about)
    results.write_section(arguments.results, HEADING, text)
    machine.show({**about, "rows": rows, "ratio": ratio(rows)}, as_json=arguments.json, table=text)


def folder(run_dir: Path, method: str, seed: int) -> Path:
    return run_dir / f"{method}-seed{seed}"


def row(directory: Path, method: str, seed: int) -> dict[str, Any]:
    """Return the results of one run's evaluations; their own CPU time is not counted."""
    evaluating = 0.0
    found: dict[str, Any] = {"method": method, "seed": seed, "offline": None, "cpu_s": None}
    for record in read_jsonl(directory / "metrics.jsonl"):
        if "eval/success_rate" not in record:
            continue
        evaluating += record["evaluation_cpu_s"]
        if record["phase"] == "offline":
            found["offline"] = record["eval/success_rate"]
            if record["step"] == EQUAL_UPDATES:
                found["after_equal_updates"] = record["eval/success_rate"]
        if record["phase"] == "online" and record["eval/success_rate"] >= SUCCESS and found["cpu_s"] is None:
            found["success"] = record["eval/success_rate"]
            found["cpu_s"] = record["cpu_s"] - evaluating
            found["updates"], found["env_steps"] = record["step"], record["env_steps"]
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return found | {"whole_cpu_s": summary["cpu_s"], "evaluation_cpu_s": evaluating}


def ratio(rows: list[dict[str, Any]]) -> float | None:
    """Return our mean CPU seconds over those of QC's recipe; None unless every run reached the success rate."""
    means = {}
    for method in METHODS:
        seconds = [each["cpu_s"] for each in rows if each["method"] == method]
        if not seconds or None in seconds:
            return None
        means[method] = statistics.fmean(seconds)
    return means["ours"] / means["qc"]


def document(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        f"`{about['command']}`, one core of {about['processor']} a run: OGBench's cube-single, task 1, 100,000 play "
        "transitions, networks of 2 x 256; the script describes the methods (ours has the cheap target, and was chosen "
        "on seed 0). CPU seconds are up to the first of the evaluations (50 episodes, every 2000 steps) that reaches "
        "80 %, without evaluating.",
        "",
        f"| method | seed | {EQUAL_UPDATES} updates | end of offline | environment steps | updates | CPU s to 80 % |",
        "| --- " * 7 + "|",
    ]
    for each in rows:
        reached = ["–"] * 3
        if each["cpu_s"] is not None:
            reached = [str(each["env_steps"]), str(each["updates"]), f"{each['cpu_s']:.0f}"]
        success = " | ".join(f"{each[name]:.0%}" for name in ("after_equal_updates", "offline"))
        lines.append(f"| {each['method']} | {each['seed']} | {success} | {' | '.join(reached)} |")
    if (share := ratio(rows)) is not None:
        lines += ["", f"Ours needs {share:.2f} times the CPU seconds of QC's recipe (means over seeds)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
