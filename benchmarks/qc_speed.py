"""Measure milliseconds per update with Q-chunking's networks, to compare with its own code on the same machine.

    python benchmarks/qc_speed.py [--widths 512 256] [--batch 256] [--repeats 10] [--json]

It uses a flow MLP and two critics of 4 x 512 (or 2 x 256), horizon 5, 10 Euler steps, batch 256, and cube-single's 28
state and 5 action dimensions; best of N with 32 samples, and distillation, each followed by versions with less work in
the target. FLOPs are counted from the traced update; the rate is compared with that of a plain matrix product.
"""

from __future__ import annotations

import argparse
from typing import Any

import flops
import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import sampling
from flax import nnx

from acrlpd.agents import agent as agent_module
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.config import AgentConfig, TemperatureConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.models.mlp_flow import MLPFlowConfig
from acrlpd.types import ChunkBatch, Observation

STATE_DIM, ACTION_DIM, HORIZON = 28, 5, 5
DEPTH = {512: 4, 256: 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "best of 32": {},
    "best of 32, 8 in the target": {"target_samples": 8},
    "best of 32, 8 of 5 steps in the target": {"target_samples": 8, "target_flow_steps": 5},
    "distill": {"extraction": "distill", "best_of_n_samples": 1},
    "distill, teacher of 5 steps": {"extraction": "distill", "best_of_n_samples": 1, "flow_steps": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", choices=DEPTH, default=list(DEPTH))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    timer = sampling.Timer(arguments.repeats)
    rows = []
    for width in arguments.widths:
        for name, changes in VARIANTS.items():
            agent, data = make_agent(width, changes), make_batch(arguments.batch)
            work = flops.of(gradients, agent, data)
            rows.append(timer.row(f"{DEPTH[width]} x {width}, {name}", update(agent, data), work))
    result = {**about, "batch": arguments.batch, "rows": rows}
    machine.show(result, as_json=arguments.json, table=table(result))


def gradients(agent: ACRLPDAgent, data: ChunkBatch) -> Any:
    return agent_module._gradients(agent, data, jax.random.key(0), agent.config.loss_weights)


def make_agent(width: int, changes: dict[str, Any]) -> ACRLPDAgent:
    hidden = (width,) * DEPTH[width]
    config = AgentConfig(
        critic=CriticConfig(num_critics=2, hidden_dims=hidden, q_aggregation="mean"),
        temperature=TemperatureConfig(adaptive=False),
        action_clip=1.0,
        **changes,
    )
    policy = MLPFlowConfig(STATE_DIM, ACTION_DIM, HORIZON, hidden).create(nnx.Rngs(0))
    optimizers = dict.fromkeys(("policy", "critic", "temperature"), optax.adam(3e-4))
    return ACRLPDAgent.create(config, policy, optimizers, state_dim=STATE_DIM, rng=jax.random.key(0))


def make_batch(size: int) -> ChunkBatch:
    rng = np.random.default_rng(0)
    ones, steps = np.ones(size, np.float32), np.ones((size, HORIZON), np.float32)
    now, after = (Observation(state=rng.normal(size=(size, STATE_DIM)).astype(np.float32)) for _ in range(2))
    made = ChunkBatch(
        observations=now,
        next_observations=after,
        actions=rng.uniform(-1, 1, (size, HORIZON, ACTION_DIM)).astype(np.float32),
        rewards=-steps,
        terminals=0 * steps,
        valid=steps,
        bootstrap_mask=ones,
        sequence_mask=ones,
        episode_id=np.zeros(size, np.int32),
        step_id=np.zeros(size, np.int32),
    )
    return jax.tree.map(jnp.asarray, made)


def update(agent: ACRLPDAgent, data: ChunkBatch) -> Any:
    def call() -> Any:
        nonlocal agent
        agent, metrics = agent.update(data, jax.random.key(0))
        return metrics

    return call


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['command']} on {result['processor']}, load {result['load_average']}", ""]
    lines.append(f"{'':48}{'wall ms':>10}{'cpu ms':>10}{'GFLOP':>9}{'of matmul':>11}")
    for row in result["rows"]:
        wall, cpu = row["wall_s"]["median"] * 1e3, row["cpu_s"]["median"] * 1e3
        lines.append(f"{row['name']:48}{wall:10.1f}{cpu:10.1f}{row['gflop']:9.2f}{row['share_of_matmul']:11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
