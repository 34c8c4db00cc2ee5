"""The table in the README: the demo with several seeds, each a separate run with its own prior data.

    python benchmarks/demo_seeds.py --seeds 0 1 2 [--preset demo] [--task metaworld/window-open-v3] [--jobs 2]
        [--set agent.best_of_n_samples=4] [--pictures docs/assets] [--json]

Each run has one core. A run that has already finished is read, not made again. Results are those of the policy that a
run keeps. The table also has the success of the last offline policy, and then of the newest policy at each evaluation
of the online phase, on the same episodes: how well a robot would have worked in the meantime.
``--pictures`` draws the curves of all seeds, and one episode of the first seed before and after online training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pinned
from PIL import Image

from acrlpd.config import from_dict
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make
from acrlpd.training import films
from acrlpd.training.evaluate import wilson
from acrlpd.training.metrics import read_jsonl

DIP = 0.1  # an online evaluation lower than the last offline policy by more than this counts as a fall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--task", help="an environment instead of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its own core")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of the configuration")
    parser.add_argument("--run_dir", default="runs/seeds")
    parser.add_argument("--pictures", type=Path, help="a folder for curves.svg and film.jpg")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    options = dict(each.split("=", 1) for each in arguments.set)
    if arguments.task:
        options["env.name"] = arguments.task
    folders = {seed: folder(arguments, seed) for seed in arguments.seeds}
    missing = {seed: path for seed, path in folders.items() if not pinned.is_finished(path)}
    commands = [
        pinned.command(arguments.preset, path, {"seed": str(seed), **options}) for seed, path in missing.items()
    ]
    pinned.run(commands, arguments.jobs)
    runs = {seed: read(path) for seed, path in folders.items()}
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        draw_curves(folders, arguments.pictures / f"{arguments.preset}-curves.svg")
        draw_film(folders[arguments.seeds[0]], arguments.pictures / f"{arguments.preset}-film.jpg")
    machine.show({**about, "runs": runs}, as_json=arguments.json, table=table(runs))


def folder(arguments: argparse.Namespace, seed: int) -> Path:
    task = "" if arguments.task is None else f"-{arguments.task.split('/')[-1]}"
    return Path(arguments.run_dir) / f"{arguments.preset}{task}-seed{seed}"


def read(directory: Path) -> dict[str, Any]:
    """Return a run's summary with its ``online_curve``: success rates from the last offline policy on."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    rates = [rate for step, rate in curve(directory).items() if step >= offline_steps(directory)]
    return summary | {"online_curve": rates}


def offline_steps(directory: Path) -> int:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))["offline_steps"]


def curve(directory: Path) -> dict[int, float]:
    """Return the success of the evaluations on the way by step. At one step, they precede the final one of a phase."""
    found: dict[int, float] = {}
    for record in read_jsonl(directory / "metrics.jsonl"):
        if "eval/success_rate" in record and record["phase"] != "bc":
            found.setdefault(record["step"], record["eval/success_rate"])
    return dict(sorted(found.items()))


def table(runs: dict[int, dict]) -> str:
    columns = [
        "seed",
        "imitation",
        "after offline",
        "after online",
        "online evaluations",
        "updates",
        "steps",
        "minutes",
    ]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    phases = ("bc", "offline", "online")
    for seed, summary in runs.items():
        results = " | ".join(interval(summary["phases"][phase]) for phase in phases)
        before, *after = summary["online_curve"]
        curve = f"{before:.0%}: " + " ".join(f"{rate * 100:.0f}" for rate in after)
        lines.append(
            f"| {seed} | {results} | {curve} | {summary['updates']} | {summary['env_steps']} "
            f"| {summary['wall_s'] / 60:.1f} |"
        )
    results = " | ".join(
        interval(together([summary["phases"][phase] for summary in runs.values()])) for phase in phases
    )
    lines.append(f"| all | {results} | | | | |")
    fallen = [seed for seed, each in runs.items() if falls(each)]
    lines.append(
        f"\nRuns with an online evaluation more than {DIP:.0%} below their own offline policy: {fallen or 'none'}"
    )
    return "\n".join(lines)


def falls(summary: dict[str, Any]) -> bool:
    before, *after = summary["online_curve"]
    return bool(after) and min(after) < before - DIP - 1e-9


def together(phases: list[dict[str, Any]]) -> dict[str, Any]:
    successes, episodes = (int(sum(each[name] for each in phases)) for name in ("successes", "episodes"))
    low, high = wilson(successes, episodes)
    return {"successes": successes, "episodes": episodes, "low": low, "high": high}


def interval(phase: dict) -> str:
    return f"{phase['successes']}/{phase['episodes']} [{phase['low']:.0%}, {phase['high']:.0%}]"


def draw_curves(folders: dict[int, Path], path: Path) -> None:
    """Draw success over updates as one thin line per seed, with their mean; pure imitation is a cross."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    curves = [curve(directory) for directory in folders.values()]
    for number, each in enumerate(curves):
        axes.plot([*each], [*each.values()], color="C0", alpha=0.35, linewidth=1, label="" if number else "one seed")
    common = sorted(set.intersection(*map(set, curves)))
    means = [np.mean([each[step] for each in curves]) for step in common]
    axes.plot(common, means, color="C0", marker="o", markersize=4, linewidth=2.5, label=f"mean of {len(curves)} seeds")
    boundary = max(offline_steps(directory) for directory in folders.values())
    imitation = [read(directory)["phases"]["bc"]["success"] for directory in folders.values()]
    axes.plot([boundary] * len(imitation), imitation, "x", color="C1", label="imitation alone")
    axes.axvline(boundary, color="0.6", linestyle=":")
    axes.text(boundary, 1.06, " online", color="0.4")
    axes.text(boundary, 1.06, "offline ", color="0.4", ha="right")
    axes.set(xlabel="updates", ylabel="success rate", ylim=(-0.03, 1.03))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_film(directory: Path, path: Path) -> None:
    """Draw the same episode by imitation (above) and after online training (below), replayed with pictures."""
    outcomes = {name: films.load_outcomes(directory / "evaluations" / f"{name}.npz") for name in ("bc", "online")}
    seed = films.improved_seed(outcomes["bc"], outcomes["online"])
    if seed is None:
        raise ValueError(f"{directory}: no episode failed by imitation and succeeded after online training")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    environment = make(from_dict(EnvConfig, config["env"]))
    rows = []
    for each in outcomes.values():
        frames, _ = films.film(environment, seed, each.episode(seed)[1])
        rows.append(np.concatenate(list(frames.values())[: films.NUM_FRAMES], axis=1))
    environment.close()
    width = min(row.shape[1] for row in rows)
    Image.fromarray(np.concatenate([row[:, :width] for row in rows])).save(path, quality=85)


if __name__ == "__main__":
    main()
