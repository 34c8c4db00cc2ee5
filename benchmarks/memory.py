"""What ``acrlpd plan`` says against what a run really takes, for three small configurations on this machine's CPU.

    python benchmarks/memory.py [--json]

Each runs in a process of its own: a few updates, and by how much the peak of resident memory rose above what it was
before the agent was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import sys
import threading
from pathlib import Path

import jax
import numpy as np

from acrlpd import presets
from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import memory, setup
from acrlpd.training.setup import Dims

DIMS = Dims(state=32, action=8)


def _mlp(width: int, batch: int, candidates: int) -> TrainConfig:
    return TrainConfig(
        policy=PolicyConfig(kind="mlp_flow", action_horizon=10, hidden_dims=(width,) * 4),
        agent=AgentConfig(
            critic=CriticConfig(num_critics=4, hidden_dims=(256, 256)), best_of_n_samples=candidates, flow_steps=4
        ),
        data=DataConfig(path="none", batch_size=batch, action_dim=DIMS.action),
        online_steps=0,
    )


def _nano(batch: int) -> TrainConfig:
    demo = presets.get_preset("demo")
    policy = dataclasses.replace(demo.policy, action_horizon=10)
    data = DataConfig(path="none", batch_size=batch, action_dim=DIMS.action)
    return dataclasses.replace(demo, env=None, online_steps=0, policy=policy, data=data)


CONFIGURATIONS = {"parameters": _mlp(2048, 16, 4), "candidates": _mlp(512, 256, 64), "nano pi0": _nano(128)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str) -> dict[str, float]:
    config = CONFIGURATIONS[name]
    planned = memory.plan(config, memory.Machine(1), dims=DIMS).total_bytes
    program = compiled(config)
    before, peak, stop = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    agent = setup.make_agent(config, DIMS, ())
    batch = jax.tree.map(_zeros, memory.batch_shapes(config, DIMS, (), config.data.batch_size))
    for step in range(3):
        agent, metrics = program(agent, batch, jax.random.key(step), agent.config.loss_weights)
        jax.block_until_ready((agent, metrics))
    stop.set()
    watcher.join()
    return {"planned": planned, "measured": peak[0] - before}


def compiled(config: TrainConfig):
    """The update as it runs, compiled before anything is measured: the compiler needs memory too."""
    agent = jax.eval_shape(lambda: setup.create_agent(config, DIMS, ()))
    batch = memory.batch_shapes(config, DIMS, (), config.data.batch_size)
    return memory.lower_update(agent, batch).compile(memory.QUICKLY)


def _zeros(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(shape.shape, shape.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=list(CONFIGURATIONS))
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(CONFIGURATIONS)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = {name: pool.apply(measure, (name,)) for name in names}
    for row in found.values():
        row["planned_over_measured"] = row["planned"] / row["measured"]
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, row in found.items():
            sizes = f"planned {row['planned'] / 1e6:7.0f} MB, measured {row['measured'] / 1e6:7.0f} MB"
            print(f"{name:12} {sizes}, ratio {row['planned_over_measured']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
