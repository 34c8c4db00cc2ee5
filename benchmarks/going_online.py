"""What happens when the online phase begins: one offline run, continued in several ways from the same checkpoint.

    python benchmarks/going_online.py --seeds 14 15 [--preset demo] [--task metaworld/faucet-open-v3] [--steps 3000]
        [--variants default newest best-of-4] [--jobs 2] [--json]

Each offline run is made once and copied for each variant, whose flags are those of ``VARIANTS``. The table has the
success of the last offline policy and of each evaluation of the online phase, all on the same episodes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import demo_seeds
import machine
import pinned

LOW_RATES = {
    f"optimizers.{group}.schedule.{rate}": "3e-4" for group in ("policy", "critic") for rate in ("peak_lr", "decay_lr")
}
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "before": {"agent.act_by_target_critic": "False", "data.online_ratio_episodes": "1"},
    "newest-critics": {"agent.act_by_target_critic": "False"},
    "half-at-once": {"data.online_ratio_episodes": "1"},
    "all-rows-alike": {"data.online_ratio": "None"},
    "best-of-4": {"agent.best_of_n_samples": "4"},
    "best-of-8": {"agent.best_of_n_samples": "8"},
    "greedy": {"agent.top_k": "1"},
    "collect-first": {"warmup_env_steps": "1000"},
    "low-rates": LOW_RATES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--task", help="an environment instead of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[14, 15])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--steps", type=int, default=3000, help="of the online phase")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its own core")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/going-online"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    bases = {seed: demo_seeds.folder(arguments, seed) for seed in arguments.seeds}
    task = {"env.name": arguments.task} if arguments.task else {}
    wanted = {seed: base for seed, base in bases.items() if not pinned.is_finished(base)}
    commands = [
        pinned.command(arguments.preset, base, {"seed": str(seed), "online_steps": "0"} | task)
        for seed, base in wanted.items()
    ]
    pinned.run(commands, arguments.jobs)
    found = {
        (seed, name): base.parent / name / base.name for name in arguments.variants for seed, base in bases.items()
    }
    pinned.run(
        [
            continued(arguments, bases[seed], path, VARIANTS[name])
            for (seed, name), path in found.items()
            if not path.exists()
        ],
        arguments.jobs,
    )
    curves = {f"{name}, seed {seed}": demo_seeds.read(path)["online_curve"] for (seed, name), path in found.items()}
    machine.show({**about, "curves": curves}, as_json=arguments.json, table=table(curves))


def continued(arguments: argparse.Namespace, base: Path, path: Path, flags: dict[str, str]) -> list[str]:
    """Copy an offline run to ``path`` and return the command that trains the copy online."""
    shutil.copytree(base, path)
    words = [sys.executable, "-m", "acrlpd.cli.main", "train", "--resume", str(path), "--override"]
    flags = {
        "run_dir": str(path.parent),
        "online_steps": str(arguments.steps),
        "early_stopping_patience": "100",
    } | flags
    for flag, value in flags.items():
        words += [f"--{flag}", value]
    return words


def table(curves: dict[str, list[float]]) -> str:
    lines = ["| variant | offline | online evaluations |", "| --- | --- | --- |"]
    for name, (before, *after) in curves.items():
        lines.append(f"| {name} | {before:.0%} | {' '.join(f'{rate * 100:.0f}' for rate in after)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
