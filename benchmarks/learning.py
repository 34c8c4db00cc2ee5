"""Compare what each method learns with equal data and updates, and the effect of each of our choices (docs/results.md).

    python benchmarks/learning.py [--tasks single double] [--methods bc qc ...] [--seeds 0 1 2] [--jobs 2]

Every combination of task, method and seed is a separate run under ``--run_dir``, on one core. Finished runs are read
and stopped runs are resumed, so the work can be done in pieces; the table is made from the finished runs. All methods
of one task and seed learn from the same episodes, which are collected first: ``demo-cube``'s expert with strong smooth
noise. Flow MLP and critics are 2 x 256; a run takes two to four minutes. ``--episodes``, ``--offline_steps``,
``--online_steps`` and ``--eval_episodes`` make it shorter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import pinned
import results

from acrlpd.config import CollectConfig
from acrlpd.envs.env import EnvConfig
from acrlpd.training.collection import collect_prior
from acrlpd.training.evaluate import wilson


@dataclasses.dataclass(frozen=True)
class Task:
    env: str
    noise: tuple[float, float]  # range of the expert's noise strength, drawn for each episode


TASKS = {
    "single": Task("ogbench/cube-single-play-singletask-task1-v0", (0.4, 1.0)),  # the data of demo-cube
    "double": Task("ogbench/cube-double-play-singletask-task1-v0", (0.0, 0.8)),
}
COMMON = {
    "policy.hidden_dims": "256 256",
    "agent.critic.hidden_dims": "256 256",
    "eval.frequency": "1000000",  # only at the end of each phase
}
MLP = {"policy.kind": "mlp_flow"}
LEAN, CHEAP = (MLP | {"algorithm": name} for name in ("lean", "lean-cheap"))
METHODS: dict[str, dict[str, str]] = {
    "bc": MLP | {"algorithm": "bc"},
    "qc": MLP | {"algorithm": "qc"},
    "qc-fql": MLP | {"algorithm": "qc-fql"},
    "rlpd-ac": {"algorithm": "rlpd-ac"},
    "ours": LEAN,
    "ours, cheap target": CHEAP,
    "ours, q_gradient": LEAN | {"agent.extraction": "q_gradient"},
    "ours, distill": LEAN | {"agent.extraction": "distill"},
    "ours, min": LEAN | {"agent.critic.q_aggregation": "min"},
    "ours, weighted": LEAN | {"agent.critic.q_aggregation": "weighted"},
    "ours, subset": LEAN | {"agent.critic.q_aggregation": "subset", "agent.critic.num_critics": "10"},
    "ours, 10 critics": LEAN | {"agent.critic.num_critics": "10"},
}
HEADING = "What each method learns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--offline_steps", type=int, default=1500)
    parser.add_argument("--online_steps", type=int, default=6000)
    parser.add_argument("--eval_episodes", type=int, default=50)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own core")
    parser.add_argument("--table_only", action="store_true", help="only make the table of finished runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    if not arguments.table_only:
        wanted = [run for run in _each(arguments) if not pinned.is_finished(folder(*run, arguments))]
        pinned.run([command(*run, arguments) for run in wanted], arguments.jobs)
    found = [row for task in arguments.tasks for method in arguments.methods if (row := _row(task, method, arguments))]
    text = document(found, about, arguments)
    if found:
        results.write_section(arguments.results, HEADING, text)
    machine.show({**about, "rows": found}, as_json=arguments.json, table=text)


def _each(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield all runs, with seeds as the outermost loop, so that every method is run once early on."""
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                yield task, method, seed


def folder(task: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    return arguments.run_dir / f"{task}-{method.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def command(task: str, method: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return the command of one run; collect its prior data first if it is missing."""
    data = arguments.run_dir / f"prior-{task}-seed{seed}"
    collect = CollectConfig(episodes=arguments.episodes, noise_range=TASKS[task].noise)
    collect_prior(EnvConfig(TASKS[task].env), collect, data, seed=seed)
    options = (
        COMMON | METHODS[method] | {"env.name": TASKS[task].env, "data.path": shlex.quote(str(data)), "seed": str(seed)}
    )
    options["offline_steps"] = str(0 if method == "rlpd-ac" else arguments.offline_steps)
    options["online_steps"] = str(0 if method == "bc" else arguments.online_steps)
    options["eval.episodes"] = str(arguments.eval_episodes)
    return pinned.command("demo-cube", folder(task, method, seed, arguments), options)


def _row(task: str, method: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the results of all finished seeds of one method, or None without any."""
    directories = [folder(task, method, seed, arguments) for seed in arguments.seeds]
    finished = [each for each in directories if pinned.is_finished(each)]
    if not finished:
        return None
    summaries = [json.loads((each / "summary.json").read_text(encoding="utf-8")) for each in finished]
    phases = {phase: pooled(summaries, phase) for phase in ("bc", "offline", "online")}
    return {
        "task": task,
        "method": method,
        "seeds": len(finished),
        "phases": phases,
        "successes": [list(summary["phases"].values())[-1]["successes"] for summary in summaries],
        "cpu_s": [summary["cpu_s"] for summary in summaries],
    }


def pooled(summaries: list[dict[str, Any]], phase: str) -> dict[str, float] | None:
    """Return the success rate over the episodes of all seeds, with Wilson's interval."""
    found = [summary["phases"][phase] for summary in summaries if phase in summary["phases"]]
    if not found:
        return None
    successes, episodes = (sum(int(each[name]) for each in found) for name in ("successes", "episodes"))
    low, high = wilson(successes, episodes)
    return {"success": successes / episodes, "episodes": episodes, "low": low, "high": high}


def document(rows: list[dict[str, Any]], about: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = [f"Made by `{about['command']}` on {about['cpu_count']} cores of {about['processor']}."]
    lines.append(
        f"A run: {arguments.offline_steps} updates offline, {arguments.online_steps} environment steps online, on "
        f"{arguments.episodes} scripted episodes with smooth noise, networks of 2 x 256, batches of 64, best of 16 by "
        "five Euler steps; bc has no online phase, rlpd-ac no offline one. Success with Wilson's 95 % interval over "
        "the evaluation episodes of all seeds."
    )
    lines.append(
        "Ours is `--algorithm lean`: its target takes the best of 16 by five Euler steps, as QC's does; the cheap "
        "one (`lean-cheap`) the best of 2 by three."
    )
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += ["", f"### {TASKS[task].env}", ""]
        lines.append("| method | seeds | imitation | after offline | after online | last phase, each seed | CPU s |")
        lines.append("| --- " * 7 + "|")
        for row in rows:
            if row["task"] == task:
                phases = " | ".join(interval(row["phases"][phase]) for phase in ("bc", "offline", "online"))
                cpu = f"{sum(row['cpu_s']) / row['seeds']:.0f}"
                each = ", ".join(f"{successes}" for successes in row["successes"])
                lines.append(f"| {row['method']} | {row['seeds']} | {phases} | {each} | {cpu} |")
    return "\n".join(lines) + "\n"


def interval(phase: dict[str, float] | None) -> str:
    return "–" if phase is None else f"{phase['success']:.0%} [{phase['low']:.0%}, {phase['high']:.0%}]"


if __name__ == "__main__":
    main()
