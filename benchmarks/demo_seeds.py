"""The README's table: the demo for several seeds, each a run of its own with its own prior data.

    python benchmarks/demo_seeds.py --seeds 0 1 2 [--preset demo] [--pictures docs/assets] [--json]

A run that has finished before is read, not made again. ``--pictures`` draws the curves of all seeds, and one episode of
the first seed before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import machine
import numpy as np
import pinned
from PIL import Image

from acrlpd.config import from_dict
from acrlpd.envs.env import EnvConfig, make
from acrlpd.training import films
from acrlpd.training.metrics import read_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run_dir", default="runs/seeds")
    parser.add_argument("--pictures", type=Path, help="a folder for curves.svg and film.jpg")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    runs = {seed: run(arguments.preset, seed, Path(arguments.run_dir)) for seed in arguments.seeds}
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        folders = {seed: folder(arguments.preset, seed, Path(arguments.run_dir)) for seed in arguments.seeds}
        draw_curves(folders, arguments.pictures / f"{arguments.preset}-curves.svg")
        draw_film(folders[arguments.seeds[0]], arguments.pictures / f"{arguments.preset}-film.jpg")
    machine.show({**about, "runs": runs}, as_json=arguments.json, table=table(runs))


def folder(preset: str, seed: int, run_dir: Path) -> Path:
    return run_dir / f"{preset}-seed{seed}"


def run(preset: str, seed: int, run_dir: Path) -> dict:
    directory = folder(preset, seed, run_dir)
    summary = directory / "summary.json"
    if not pinned.is_finished(directory):
        where = ["--name", directory.name, "--run_dir", str(run_dir), "--overwrite"]
        command = ["train", preset, "--seed", str(seed), *where]
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


def draw_curves(folders: dict[int, Path], path: Path) -> None:
    """Success over updates, one line a seed with its Wilson intervals; imitation as a cross where it was evaluated."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for number, (seed, directory) in enumerate(folders.items()):
        color, aside = f"C{number}", 12 * (number - 1)
        found = [each for each in read_jsonl(directory / "metrics.jsonl") if "eval/success_rate" in each]
        for marker, style, points in (
            ("x", "", [each for each in found if each["phase"] == "bc"]),
            ("o", "-", [each for each in found if each["phase"] != "bc"]),
        ):
            steps = [each["step"] + aside for each in points]
            axes.vlines(
                steps, [e["eval/low"] for e in points], [e["eval/high"] for e in points], color=color, alpha=0.4
            )
            label = f"seed {seed}" if style else None
            rates = [each["eval/success_rate"] for each in points]
            axes.plot(steps, rates, color=color, marker=marker, linestyle=style, label=label, markersize=5)
        boundary = max(each["step"] for each in found if each["phase"] == "offline")
    axes.axvline(boundary, color="0.6", linestyle=":")
    axes.text(boundary, 1.06, " online", color="0.4")
    axes.text(boundary, 1.06, "offline ", color="0.4", ha="right")
    axes.set(xlabel="updates", ylabel="success rate (x: imitation alone)", ylim=(-0.03, 1.03))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_film(directory: Path, path: Path) -> None:
    """The same episode by imitation (above) and after online training (below), executed again with pictures."""
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
