"""Measure what ``acrlpd improve`` adds to a policy that imitates episodes of mixed quality, without changing a weight.

    python benchmarks/improve.py [--task drawer] [--seeds 0 1 2] [--episodes 100] [--jobs 2] [--steps 5000] [--json]

For each seed: ``acrlpd train PRESET --algorithm bc``, ``acrlpd improve`` of that run on its own prior data, then the
same episodes with a plain sample, the best of N, guided samples, guided best of N, and what improve chose. Each process
has one core. What has been done is read. Intervals are Wilson's 95 %. CPU seconds are those of imitation, of improve
(start, encoding, critics, choice; of the last process, if it was resumed), and of each evaluation.

drawer: MetaWorld's drawer-open, 100 episodes of a noisy expert, of which one in seven succeeds. cube: OGBench's
cube-single, task 1, on 100 episodes of play; the policy is a flow MLP on the state.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import machine
import pinned
import play_data

from acrlpd import load_checkpoint
from acrlpd.files import read_json
from acrlpd.training import setup
from acrlpd.training.evaluate import evaluate, wilson

NEVER = "1000000"
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "drawer": ("demo", {}),
    "cube": (
        "demo-cube",
        {
            "env.name": "ogbench/cube-single-play-singletask-task1-v0",
            "data.cube_goal": "0.425 -0.1 0.02",
            "policy.kind": "mlp_flow",
            "policy.hidden_dims": "256 256",
            "agent.critic.hidden_dims": "256 256",
            "offline_steps": "12000",
        },
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain sample": {"mode": "bc"},
    "best of N": {"extraction": "best_of_n", "mode": "greedy"},
    "guided": {"extraction": "guided", "mode": "greedy", "samples": 1},
    "guided best of N": {"extraction": "guided", "mode": "greedy"},
    "as chosen": {"mode": "greedy", "samples": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="drawer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16, help="N, where it is not chosen")
    parser.add_argument("--guidance", type=float, default=0.3, help="weight, where it is not chosen")
    parser.add_argument("--steps", type=int, default=5000, help="updates of critics and V")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of improve's configuration"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, each on its own core")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/improve"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)  # what a process of this script does
    arguments = parser.parse_args()
    if arguments.evaluate:
        measure(arguments.evaluate, arguments)
        return
    about = machine.describe()
    folders = {seed: arguments.run_dir / f"{arguments.task}-seed{seed}" for seed in arguments.seeds}
    imitate(arguments, folders)
    improve(arguments, folders)
    missing = [path for path in folders.values() if not (path / "measured.json").exists()]
    pinned.run([[sys.executable, *sys.argv, "--evaluate", str(path)] for path in missing], arguments.jobs)
    rows = {seed: read_json(path / "measured.json") for seed, path in folders.items()}
    machine.show({**about, "seeds": rows}, as_json=arguments.json, table=table(rows))


def imitate(arguments: argparse.Namespace, folders: dict[int, Path]) -> None:
    preset, options = TASKS[arguments.task]
    if arguments.task == "cube":
        data = arguments.run_dir / "cube-single-play-100k.npz"
        if not data.exists():
            play_data.write(data, episodes=100, seed=101)
        options = options | {"data.path": str(data)}
    options = options | {"algorithm": "bc", "eval.frequency": NEVER, "eval.episodes": "1", "eval.num_envs": "1"}
    options |= {"eval.progress_episodes": "1"}
    wanted = {seed: path / "bc" for seed, path in folders.items() if not pinned.is_finished(path / "bc")}
    pinned.run(
        [pinned.command(preset, path, {"seed": str(seed), **options}) for seed, path in wanted.items()], arguments.jobs
    )


def improve(arguments: argparse.Namespace, folders: dict[int, Path]) -> None:
    changes = [word for each in arguments.set for word in (f"--{each.split('=', 1)[0]}", each.split("=", 1)[1])]
    commands = []
    for path in folders.values():
        better = path / "improved"
        if not (better / "improve.json").exists():
            words = [
                "improve",
                str(path / "bc"),
                "--output_dir",
                str(better),
                "--steps",
                str(arguments.steps),
                *changes,
            ]
            resume = ["--resume"] if (better / "config.json").exists() else []
            commands.append([sys.executable, "-m", "acrlpd.cli.main", *words, *resume])
    pinned.run(commands, arguments.jobs)


def measure(path: Path, arguments: argparse.Namespace) -> None:
    """Evaluate every way to act on the same episodes, and write ``measured.json``."""
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        found[name] = _measured(path / "improved", way, arguments)
    verdict = read_json(path / "improved" / "improve.json")
    found["cpu_s"] = {"bc": read_json(path / "bc" / "summary.json")["cpu_s"], "improved": verdict["cpu_s"]}
    found["verdict"] = verdict
    (path / "measured.json").write_text(json.dumps(found), encoding="utf-8")


def _measured(checkpoint: Path, way: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    guided = way.get("extraction") == "guided"
    weights = (arguments.guidance,) if guided else None
    loaded = load_checkpoint(checkpoint, extraction=way.get("extraction"), guidance_weights=weights)
    config = loaded.config
    first = config.eval.first_seed
    environments = setup.make_environments(config, min(10, arguments.episodes))
    started = time.process_time()
    result, _ = evaluate(
        loaded.agent,
        loaded.transform,
        environments,
        range(first, first + arguments.episodes),
        mode=way["mode"],
        rng=jax.random.key(0),
        execute_horizon=config.executed_steps,
        num_samples=way.get("samples", arguments.samples),
    )
    environments.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**result.to_dict(), "cpu_s": time.process_time() - started, "max_rss_kb": memory}


def table(rows: dict[int, dict[str, Any]]) -> str:
    columns = ["seed", *WAYS, "chosen", "AUC", "CPU s: imitation", "improve"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for seed, row in rows.items():
        verdict = row["verdict"]
        chosen, area, bounds = (verdict[key] for key in ("chosen", "auc", "auc_interval"))
        told = "unknown" if area is None else f"{area:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
        ways = " | ".join(f"{interval(row[way])} {row[way]['cpu_s']:.0f} s" for way in WAYS)
        seconds = f"{row['cpu_s']['bc']:.0f} | {row['cpu_s']['improved']:.0f}"
        lines.append(f"| {seed} | {ways} | N {chosen['samples']}, {chosen['guidance']:g} | {told} | {seconds} |")
    everything = " | ".join(together([row[way] for row in rows.values()]) for way in WAYS)
    return "\n".join([*lines, f"| all | {everything} | | | | |"])


def together(results: Sequence[dict[str, Any]]) -> str:
    successes, episodes = (int(sum(each[name] for each in results)) for name in ("successes", "episodes"))
    low, high = wilson(successes, episodes)
    return interval({"successes": successes, "episodes": episodes, "low": low, "high": high})


def interval(result: dict[str, Any]) -> str:
    return f"{result['successes']:.0f}/{result['episodes']:.0f} [{result['low']:.0%}, {result['high']:.0%}]"


if __name__ == "__main__":
    main()
