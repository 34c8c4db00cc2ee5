"""Compare the memory that ``acrlpd plan`` predicts with what a run needs, for three small configurations on the CPU.

    python benchmarks/memory.py [--json]

Each configuration runs in its own process: a new agent does a few updates of the program as a run compiles it, and the
rise of the peak resident memory is measured. The same has been run once before, because compilers need memory
themselves. What that run left is returned to the system, because memory that is reused would not be measured.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import resource
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from jax.stages import Compiled

from acrlpd import presets
from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import build, memory
from acrlpd.training.build import Dims

DIMS = Dims(state=32, action=8)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # glibc's malloc.h


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
    data = DataConfig(path="none", batch_size=batch, action_dim=DIMS.action, cameras=("top",))
    return dataclasses.replace(demo, env=None, online_steps=0, policy=policy, data=data)


CONFIGURATIONS = {"parameters": _mlp(2048, 16, 4), "candidates": _mlp(512, 256, 64), "nano pi0": _nano(128)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str) -> dict[str, float]:
    config = CONFIGURATIONS[name]
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(M_MMAP_THRESHOLD, 64 * 1024)  # every array gets its own mapping, which ends when it is freed
    library.mallopt(M_ARENA_MAX, 1)
    cameras = config.data.cameras
    planned = memory.plan(config, memory.Machine(1), dims=DIMS, cameras=cameras).total_bytes
    program = compiled(config)
    run(config, program, updates=1)
    gc.collect()
    library.malloc_trim(0)
    before, peak, stop = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(config, program, updates=3)
    stop.set()
    watcher.join()
    return {"planned": planned, "measured": peak[0] - before}


def run(config: TrainConfig, program: Compiled, *, updates: int) -> None:
    """Create an agent and update it; nothing is kept."""
    cameras = config.data.cameras
    agent = build.make_agent(config, DIMS, cameras)
    batch = jax.tree.map(_ones, memory.batch_shapes(config, DIMS, cameras, config.data.batch_size))
    for step in range(updates):
        agent, metrics = program(agent, batch, jax.random.key(step), agent.config.loss_weights)
        jax.block_until_ready((agent, metrics))


def compiled(config: TrainConfig) -> Compiled:
    """Compile the update as a run does."""
    cameras = config.data.cameras
    agent = jax.eval_shape(lambda: build.create_agent(config, DIMS, cameras))
    batch = memory.batch_shapes(config, DIMS, cameras, config.data.batch_size)
    return memory.lower_update(agent, batch).compile()


def _ones(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Return ones: for zeros, the system would not allocate memory."""
    return np.ones(shape.shape, shape.dtype)


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
