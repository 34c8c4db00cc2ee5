"""The success at the start of the online phase: offline runs, each continued in several ways from its last checkpoint.

    python benchmarks/going_online.py --seeds 14 15 [--preset demo] [--task metaworld/faucet-open-v3] [--steps 2250]
        [--variants before default] [--jobs 2] [--picture docs/assets/going-online.svg] [--json]

An offline run is made once and copied for each variant; ``VARIANTS`` has their flags. The table has the success of the
last offline policy and of each online evaluation, all on the same episodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import demo_seeds
import machine
import pinned

# no moving average acts, among all candidates: that is another offline policy, too
PLAIN = {"agent.policy_ema_decay": "None", "agent.typical_share": "1"}
BEFORE = {"agent.act_by_target_critic": "False", "data.online_ratio_episodes": "1"}
RATES = ("policy.schedule.peak_lr", "policy.schedule.decay_lr", "critic.schedule.peak_lr", "critic.schedule.decay_lr")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The flags of the offline run, and those that change when it goes online."""

    offline: dict[str, str]
    online: dict[str, str] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "default": Variant({}),
    "all candidates": Variant({"agent.typical_share": "1"}),
    "before": Variant(PLAIN, BEFORE),
    "before, best of 4": Variant(PLAIN, BEFORE | {"agent.best_of_n_samples": "4"}),
    "before, all rows alike": Variant(PLAIN, BEFORE | {"data.online_ratio": "None"}),
    "before, greedy while collecting": Variant(PLAIN, BEFORE | {"agent.top_k": "1"}),
    "before, 1000 steps of collection first": Variant(PLAIN, BEFORE | {"warmup_env_steps": "1000"}),
    "before, lower rates": Variant(PLAIN, BEFORE | {f"optimizers.{rate}": "3e-4" for rate in RATES}),
    "share of own rows grows": Variant(PLAIN, {"agent.act_by_target_critic": "False"}),
    "target critics act": Variant(PLAIN, {"data.online_ratio_episodes": "1"}),
    "share grows, target critics act": Variant(PLAIN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--task", help="an environment instead of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[14, 15])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--steps", type=int, default=2250, help="of the online phase")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its own core")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/going-online"))
    parser.add_argument("--picture", type=Path, help="draw the curves, a panel for each seed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    cells = [(name, seed) for name in arguments.variants for seed in arguments.seeds]
    bases = {cell: base(arguments, *cell) for cell in cells}
    offline = {path: offline_command(arguments, path, *cell) for cell, path in bases.items()}
    pinned.run([command for path, command in offline.items() if not pinned.is_finished(path)], arguments.jobs)
    runs = {cell: arguments.run_dir / cell[0].replace(" ", "-").replace(",", "") / bases[cell].name for cell in cells}
    online = [continued(arguments, bases[cell], path, VARIANTS[cell[0]]) for cell, path in runs.items()]
    pinned.run([command for command in online if command], arguments.jobs)
    if arguments.picture:
        draw(runs, arguments.picture)
    curves = {f"{name}, seed {seed}": demo_seeds.read(path)["online_curve"] for (name, seed), path in runs.items()}
    machine.show({**about, "curves": curves}, as_json=arguments.json, table=table(curves))


def base(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    kind = "plain" if VARIANTS[name].offline else "default"
    return arguments.run_dir / f"offline-{kind}" / demo_seeds.folder(arguments, seed).name


def offline_command(arguments: argparse.Namespace, path: Path, name: str, seed: int) -> list[str]:
    task = {"env.name": arguments.task} if arguments.task else {}
    options = {"seed": str(seed), "online_steps": "0"} | VARIANTS[name].offline | task
    return pinned.command(arguments.preset, path, options)


def continued(arguments: argparse.Namespace, offline: Path, path: Path, variant: Variant) -> list[str]:
    """Copy an offline run and return the command that trains it online; nothing if that is already done."""
    if pinned.is_finished(path) and demo_seeds.read(path)["env_steps"]:
        return []
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(offline, path)
    words = [sys.executable, "-m", "acrlpd.cli.main", "train", "--resume", str(path), "--override"]
    options = {"run_dir": str(path.parent), "online_steps": str(arguments.steps), "early_stopping_patience": "100"}
    for option, value in (options | variant.online).items():
        words += [f"--{option}", value]
    return words


def draw(runs: dict[tuple[str, int], Path], picture: Path) -> None:
    """Draw the success of each variant over updates, from the last offline policy on, one panel for each seed."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    seeds, variants = sorted({seed for _, seed in runs}), [*dict.fromkeys(name for name, _ in runs)]
    figure, panels = plt.subplots(1, len(seeds), figsize=(4 * len(seeds), 3.2), layout="constrained", squeeze=False)
    for panel, seed in zip(panels[0], seeds, strict=True):
        for (name, _), path in ((cell, path) for cell, path in runs.items() if cell[1] == seed):
            start, curve = demo_seeds.offline_steps(path), demo_seeds.curve(path)
            steps = [step for step in curve if step >= start]
            color = f"C{variants.index(name)}"
            panel.axhline(curve[start], color=color, linestyle=":", linewidth=1)
            panel.plot([step - start for step in steps], [curve[step] for step in steps], "o-", color=color, label=name)
        panel.set(title=f"seed {seed}", xlabel="online updates", ylim=(-0.03, 1.03))
    panels[0][0].set_ylabel("success rate (dotted: offline)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def table(curves: dict[str, list[float]]) -> str:
    lines = ["| variant | offline | online evaluations |", "| --- | --- | --- |"]
    for name, (before, *after) in curves.items():
        lines.append(f"| {name} | {before:.0%} | {' '.join(f'{rate * 100:.0f}' for rate in after)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
