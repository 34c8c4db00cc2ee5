"""What a checkpoint costs the updates around it, and how long it takes to lie on disk.

    python benchmarks/checkpoint.py [--json] [--width 1024] [--steps 60] [--every 20]

Updates are timed one by one, waiting for each. The share is what saving adds to the time of all of them, against the
same number of updates without a save; writing goes on beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data.normalize import NormStats
from acrlpd.models.critic import CriticConfig
from acrlpd.training import memory, setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.setup import Dims

DIMS = Dims(state=32, action=8)
STATS = {name: NormStats(np.zeros(dim), np.ones(dim)) for name, dim in (("state", 32), ("actions", 8))}


def configuration(width: int, batch_size: int) -> TrainConfig:
    return TrainConfig(
        policy=PolicyConfig(kind="mlp_flow", action_horizon=10, hidden_dims=(width,) * 4),
        agent=AgentConfig(critic=CriticConfig(num_critics=4), best_of_n_samples=8, flow_steps=4),
        data=DataConfig(path="none", batch_size=batch_size, action_dim=DIMS.action),
    )


def measure(width: int, batch_size: int, steps: int, every: int) -> dict[str, float]:
    config = configuration(width, batch_size)
    agent = setup.make_agent(config, DIMS, ())
    shapes = memory.batch_shapes(config, DIMS, (), batch_size)
    batch = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
    folder = Path(tempfile.mkdtemp())
    manager = ACRLPDCheckpointManager(folder / "checkpoints", max_to_keep=1, writer=True)
    agent, _ = agent.update(batch, jax.random.key(0))
    manager.save(agent, asset_id="benchmark", norm_stats=STATS, run={})  # the first compiles the checksums
    manager.wait()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    waits = []
    for saving in (False, True):
        for step in range(steps):
            started = time.perf_counter()
            agent, metrics = agent.update(batch, jax.random.key(step))
            jax.block_until_ready(metrics)
            if saving and step % every == 0:
                manager.save(agent, asset_id="benchmark", norm_stats=STATS, run={})
                waits.append(time.perf_counter())
            seconds[saving].append(time.perf_counter() - started)
    started = time.perf_counter()
    manager.wait()
    last = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    manager.close()
    shutil.rmtree(folder)
    without, beside = sum(seconds[False]), sum(seconds[True])
    return {
        "checkpoint_bytes": size,
        "update_s": statistics.median(seconds[False]),
        "saves": len(waits),
        "added_share": beside / without - 1,
        "added_s_per_save": (beside - without) / len(waits),
        "wait_for_last_s": last,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the four hidden layers")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="updates between saves")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.width, arguments.batch_size, arguments.steps, arguments.every)
    print(json.dumps(found) if arguments.json else "\n".join(f"{name:18} {value:g}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
