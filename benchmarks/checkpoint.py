"""Measure the time that an asynchronous checkpoint adds to the updates around it.

    python benchmarks/checkpoint.py [--size nano|mid] [--updates 100] [--repeats 20] [--json]

The benchmark runs pairs of windows with equally many updates, one after the other. In one of the two, a checkpoint
starts before the first update, and its files are written during the others. A window ends with its last update, or when
the files are on disk, if that is later. The share is how much longer the window with the checkpoint takes; the order in
a pair alternates. ``blocked`` is the part in which no update could run. "nano" is the demo's agent on its batch of 64;
"mid" has a pi0 of half a gigabyte with its optimiser.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np

from acrlpd import presets
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import DataConfig, TrainConfig
from acrlpd.data.view.normalize import NormStats
from acrlpd.training import build, memory
from acrlpd.training.build import Dims
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, checksums
from acrlpd.types import ChunkBatch

DIMS = Dims(state=32, action=8)
STATS = {name: NormStats(np.zeros(dim), np.ones(dim)) for name, dim in (("state", 32), ("actions", 8))}


def configuration(size: str) -> TrainConfig:
    demo = presets.get_preset("demo")
    data = DataConfig(path="none", batch_size=64 if size == "nano" else 8, action_dim=DIMS.action)
    config = dataclasses.replace(demo, env=None, online_steps=0, data=data)
    if size == "nano":
        return config
    policy = dataclasses.replace(
        config.policy,
        image_size=112,
        paligemma_variant="mid",
        action_expert_variant="mid_expert",
        vision_variant="mid",
    )
    return dataclasses.replace(config, policy=policy)


class Windows:
    """An agent that learns from one batch, with a folder for its checkpoints."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.agent: ACRLPDAgent = build.make_agent(config, DIMS, ())
        shapes = memory.batch_shapes(config, DIMS, (), config.data.batch_size)
        rng = np.random.default_rng(0)  # from zeros it would learn little, and there would be little to write
        self._batch: ChunkBatch = jax.tree.map(lambda x: (rng.random(x.shape) * 2).astype(x.dtype), shapes)
        self._manager = ACRLPDCheckpointManager(folder, max_to_keep=1, writer=True)
        self.update()
        checksums(self.agent)  # compiles, as the trainer does before its first checkpoint
        self.save()
        self._manager.wait()

    def update(self) -> None:
        self.agent, metrics = self.agent.update(self._batch, jax.random.key(0))
        jax.block_until_ready((self.agent, metrics))

    def save(self) -> None:
        self._manager.save(self.agent, asset_id="benchmark", norm_stats=STATS, run={})

    def seconds(self, updates: int, *, saving: bool) -> tuple[float, float, float]:
        """Return the seconds of the window, of the call that saves, and from the last update until all is on disk."""
        start = time.perf_counter()
        if saving:
            self.save()
        blocked = time.perf_counter() - start
        for _ in range(updates):
            self.update()
        trained = time.perf_counter()
        self._manager.wait()
        end = time.perf_counter()
        return end - start, blocked, end - trained


def measure(size: str, updates: int, repeats: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    windows = Windows(configuration(size), folder)
    windows.seconds(updates, saving=True)  # not counted: it writes the first files of the folder
    rows = []
    for repeat in range(repeats):
        pair = {saving: windows.seconds(updates, saving=saving) for saving in (bool(repeat % 2), not repeat % 2)}
        rows.append((pair[False][0], *pair[True]))
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return {
        "size": size,
        "updates": updates,
        "agent_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(windows.agent) if hasattr(leaf, "nbytes")),
        "checkpoint_bytes": written,
        "update_s": statistics.median(without for without, *_ in rows) / updates,
        "added_share": machine.spread([beside / without - 1 for without, beside, _, _ in rows]),
        "added_s": machine.spread([beside - without for without, beside, _, _ in rows]),
        "blocked_s": machine.spread([blocked for _, _, blocked, _ in rows]),
        "written_after_s": max(after for *_, after in rows),
    }


def table(found: dict[str, Any]) -> str:
    share, added, blocked = found["added_share"], found["added_s"], found["blocked_s"]
    return "\n".join(
        (
            f"{found['size']}: {found['agent_bytes'] / 1e6:.1f} MB, {found['checkpoint_bytes'] / 1e6:.1f} MB on disk; "
            f"an update takes {found['update_s'] * 1000:.0f} ms",
            f"a checkpoint adds {share['median']:.1%} to {found['updates']} updates "
            f"({share['min']:.1%} to {share['max']:.1%} in {share['repeats']} pairs), {added['median']:.3f} s",
            f"in {blocked['median']:.3f} s of them ({blocked['min']:.3f} to {blocked['max']:.3f}) no update could run",
            f"the last file was written at most {found['written_after_s']:.3f} s after the last update",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("nano", "mid"), default="nano")
    parser.add_argument("--updates", type=int, default=100, help="updates per window")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.size, arguments.updates, arguments.repeats)
    machine.show({**machine.describe(), **found}, as_json=arguments.json, table=table(found))


if __name__ == "__main__":
    main()
