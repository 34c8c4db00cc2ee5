"""docs/results.md: what each method learns at equal data and updates, and what each choice of ours is worth.

    python benchmarks/learning.py [--tasks single double] [--methods bc qc ...] [--seeds 0 1 2] [--seconds 3600]

Every task, method and seed is a run of its own under ``--run_dir``. A finished one is read, one that was stopped goes
on where it was, so the work can be done in pieces: ``--seconds`` stops the run under way at its next update, saved.
The table is written from whatever is finished. All methods of one task and seed learn from the same episodes, which are
collected first. Full budget: 100 episodes of prior data, 1500 updates offline, 12000 environment steps online at one
update for two, flow MLP and critics of 2 x 256; at 24 ms an update about 10 minutes a run on one core.
``--episodes``, ``--offline_steps``, ``--online_steps`` and ``--eval_episodes`` shrink it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import results

from acrlpd import presets
from acrlpd.envs.env import EnvConfig
from acrlpd.training import setup
from acrlpd.training.evaluate import wilson
from acrlpd.training.faults import EXIT_INTERRUPTED
from acrlpd.training.metrics import read_jsonl

TASKS = {
    "single": "ogbench/cube-single-play-singletask-task1-v0",
    "double": "ogbench/cube-double-play-singletask-task1-v0",
}
MLP = ["--policy.kind", "mlp_flow"]
METHODS: dict[str, list[str]] = {
    "bc": ["--algorithm", "bc", *MLP],
    "qc": ["--algorithm", "qc", *MLP],
    "qc-fql": ["--algorithm", "qc-fql", *MLP],
    "rlpd-ac": ["--algorithm", "rlpd-ac"],
    "ours": MLP,
    "ours, q_gradient": [*MLP, "--agent.extraction", "q_gradient"],
    "ours, distill": [*MLP, "--agent.extraction", "distill"],
    "ours, min": [*MLP, "--agent.critic.q_aggregation", "min"],
    "ours, weighted": [*MLP, "--agent.critic.q_aggregation", "weighted"],
    "ours, subset": [*MLP, "--agent.critic.q_aggregation", "subset"],
}
SUCCESS = 0.8  # of the time to success
HEADING = "What each method learns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--offline_steps", type=int, default=1500)
    parser.add_argument("--online_steps", type=int, default=12_000)
    parser.add_argument("--eval_episodes", type=int, default=50)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    end = time.monotonic() + arguments.seconds if arguments.seconds else None
    for task, method, seed in _each(arguments):
        if not train(task, method, seed, arguments, end):
            break
    found = [row for task in arguments.tasks for method in arguments.methods if (row := _row(task, method, arguments))]
    text = document(found, about, arguments)
    if found:
        results.write_section(arguments.results, HEADING, text)
    machine.show({**about, "rows": found}, as_json=arguments.json, table=text)


def _each(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Seeds outermost: after the first pieces every method has been seen once."""
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                yield task, method, seed


def folder(task: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    return arguments.run_dir / f"{task}-{method.replace(', ', '-')}-seed{seed}"


def train(task: str, method: str, seed: int, arguments: argparse.Namespace, end: float | None) -> bool:
    """Brings one run to its end; False if the time is over first."""
    directory = folder(task, method, seed, arguments)
    if (directory / "summary.json").exists():
        return True
    if _left(end) == 0.0:
        return False
    data = arguments.run_dir / f"prior-{task}-seed{seed}"
    collect = dataclasses.replace(presets.get_preset("demo-cube").data.collect, episodes=arguments.episodes)
    setup.collect_prior(EnvConfig(TASKS[task]), collect, data, seed=seed)
    online = 0 if method == "bc" else arguments.online_steps
    offline = 0 if method == "rlpd-ac" else arguments.offline_steps
    command = [sys.executable, "-m", "acrlpd.cli.main", "train", "demo-cube", *METHODS[method]]
    command += ["--env.name", TASKS[task], "--policy.hidden_dims", "256", "256", "--seed", str(seed)]
    command += ["--offline_steps", str(offline), "--online_steps", str(online)]
    command += ["--agent.critic.hidden_dims", "256", "256", "--data.path", str(data)]
    command += ["--eval.episodes", str(arguments.eval_episodes)]
    command += ["--run_dir", str(arguments.run_dir), "--name", directory.name]
    command += ["--resume"] if (directory / "config.json").exists() else []
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        code = process.wait(_left(end))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it finishes its update, saves and says how to resume
        code = process.wait()
    if code not in (0, EXIT_INTERRUPTED, -signal.SIGTERM):
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    return code == 0


def _left(end: float | None) -> float | None:
    """Seconds until then; None if there is no end."""
    return None if end is None else max(0.0, end - time.monotonic())


def _row(task: str, method: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """All finished seeds of one method together."""
    directories = [folder(task, method, seed, arguments) for seed in arguments.seeds]
    finished = [each for each in directories if (each / "summary.json").exists()]
    if not finished:
        return None
    summaries = [json.loads((each / "summary.json").read_text(encoding="utf-8")) for each in finished]
    phases = {phase: pooled(summaries, phase) for phase in ("bc", "offline", "online")}
    return {
        "task": task,
        "method": method,
        "seeds": len(finished),
        "phases": phases,
        "cpu_s": [summary["cpu_s"] for summary in summaries],
        "cpu_s_to_success": [cpu_to_success(each) for each in finished],
    }


def pooled(summaries: list[dict[str, Any]], phase: str) -> dict[str, float] | None:
    """Success over the episodes of all seeds, with Wilson's interval."""
    found = [summary["phases"][phase] for summary in summaries if phase in summary["phases"]]
    if not found:
        return None
    successes, episodes = (sum(int(each[name]) for each in found) for name in ("successes", "episodes"))
    low, high = wilson(successes, episodes)
    return {"success": successes / episodes, "episodes": episodes, "low": low, "high": high}


def cpu_to_success(directory: Path) -> float | None:
    """CPU seconds of the run at its first evaluation of at least 80 %; None if there was none."""
    for record in read_jsonl(directory / "metrics.jsonl"):
        if record.get("eval/success_rate", 0.0) >= SUCCESS and record["phase"] != "bc":
            return record["cpu_s"]
    return None


def document(rows: list[dict[str, Any]], about: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = [f"Made by `{about['command']}` on {about['cpu_count']} cores of {about['processor']}."]
    lines.append(
        f"A run: {arguments.offline_steps} updates offline, {arguments.online_steps} environment steps online, on "
        f"{arguments.episodes} scripted episodes with noise (`demo-cube`), networks of 2 x 256. Success with "
        "Wilson's 95 % interval over the evaluation episodes of all seeds."
    )
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += ["", f"### {TASKS[task]}", ""]
        lines.append("| method | seeds | imitation | after offline | after online | CPU s | CPU s to 80 % |")
        lines.append("| --- " * 7 + "|")
        for row in rows:
            if row["task"] == task:
                phases = " | ".join(interval(row["phases"][phase]) for phase in ("bc", "offline", "online"))
                cpu = f"{sum(row['cpu_s']) / row['seeds']:.0f}"
                reached = ", ".join("–" if each is None else f"{each:.0f}" for each in row["cpu_s_to_success"])
                lines.append(f"| {row['method']} | {row['seeds']} | {phases} | {cpu} | {reached} |")
    return "\n".join(lines) + "\n"


def interval(phase: dict[str, float] | None) -> str:
    return "–" if phase is None else f"{phase['success']:.0%} [{phase['low']:.0%}, {phase['high']:.0%}]"


if __name__ == "__main__":
    main()
