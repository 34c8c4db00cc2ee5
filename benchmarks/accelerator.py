"""Measure what one accelerator does with the real pi0 and pi0.5: chunks, updates, memory, and numbers beside a CPU's.

    python benchmarks/accelerator.py [--size full|small] [--batch 16] [--parts chunks-pi0 ...] [--json]

``full`` is the real size (3.2 B parameters, bfloat16, random weights, three cameras), to take under eight minutes
on one GPU; ``small`` is a nano model and takes three minutes on a CPU. Nothing is downloaded. Each part has a process
of its own, so its peak memory is its own, and a part that fails is reported beside the others.

chunks: the time of a compiled call that encodes the prefix once, draws N candidates in ten Euler steps and lets ten
critics choose; median, 99th percentile, and the first call with its compilation. policy: the same through the server's
policy, from raw observations to actions in the robot's units, for 1 and 8 requests in a call, without the network.
updates: supervised steps (imitation alone, as openpi trains) and updates of the agent with the same trainable
parameters: adapters (LoRA) with best of 8 and with an implicit target, and the action expert alone with a frozen
backbone and stored prefixes. Peak memory is the device's own, beside what ``acrlpd plan`` expects. parity: a tiny
pi0's chunk and loss on the device and on this machine's CPU, in float32 at the highest precision, and in bfloat16.

FLOPs are those of the traced program's products; a share is of the device's peak for bfloat16 without sparsity, where
``PEAKS`` has the device. To compare with: openpi's JAX code trains pi0.5 with 18.5 samples/s on one H100 and needs
75 ms for a chunk on an RTX 4090 (22 to 39 ms with kernels written by hand); best of 8 costs 1.7 % more there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if (
    "--part" not in sys.argv
):  # the first process only asks which devices there are, and leaves their memory to the parts
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import flops
import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax import nnx

from acrlpd import presets
from acrlpd.agents import agent as agents
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig
from acrlpd.data.view.normalize import NormStats
from acrlpd.models import flow
from acrlpd.overrides import apply_config_overrides
from acrlpd.serving.policy import AgentSampler, Policy
from acrlpd.training import build, memory
from acrlpd.training.build import Dims
from acrlpd.types import ChunkBatch, Observation

PEAKS = {  # bfloat16 FLOP/s without sparsity, from the vendors' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
}
DIMS = Dims(8, 8)
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
REAL = {
    "policy.paligemma_variant": "gemma_2b",
    "policy.action_expert_variant": "gemma_300m",
    "policy.dtype": "bfloat16",
    "policy.frozen_dtype": "bfloat16",
}
NANO = {
    "policy.paligemma_variant": "nano",
    "policy.action_expert_variant": "nano_expert",
    "policy.vision_variant": "nano",
    "policy.image_size": 32,
    "policy.vocab_size": 512,
    "policy.max_token_len": 16,
    "policy.dtype": "float32",
    "policy.remat": False,
    "agent.critic.hidden_dims": [32, 32],
}
ADAPTERS = {"policy.paligemma_variant": "gemma_2b_lora", "policy.action_expert_variant": "gemma_300m_lora"}
FROZEN = {"policy.freeze_pi0_backbone": True}
CANDIDATES = (1, 8, 32)
PARTS = ("chunks-pi0", "chunks-pi05", "policy", "updates-adapters", "updates-frozen", "parity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), help="default: full where there is an accelerator")
    parser.add_argument("--batch", type=int, help="observations in an update; default 16, small: 4")
    parser.add_argument("--repeats", type=int, help="timed calls; default 30, small: 5")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process of this script does
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    size = arguments.size or ("small" if jax.default_backend() == "cpu" else "full")
    setting = Setting(size, arguments.batch or {"full": 16, "small": 4}[size], arguments.repeats or _repeats(size))
    if arguments.part:
        print(json.dumps(measure(arguments.part, setting)))
        return
    result = machine.describe() | {"size": size, "batch": setting.batch, "peak_flops": setting.peak}
    result["parts"] = {part: in_process(part, setting) for part in arguments.parts}
    machine.show(result, as_json=arguments.json, table=table(result))


def _repeats(size: str) -> int:
    return {"full": 30, "small": 5}[size]


@dataclasses.dataclass(frozen=True)
class Setting:
    size: str
    batch: int
    repeats: int

    @property
    def peak(self) -> float | None:
        kind = jax.devices()[0].device_kind
        return next((rate for name, rate in PEAKS.items() if name in kind), None)

    def config(self, *changes: dict[str, Any]) -> TrainConfig:
        """Return the configuration of the droid preset at this size, with changes."""
        values: dict[str, Any] = {
            "env": None,
            "data.path": "none",
            "data.robot": None,  # observations already have the model's names
            "data.batch_size": self.batch,
            "agent.best_of_n_samples": 8,
            "agent.flow_steps": 10,
            "agent.critic.q_aggregation": "mean",
        }
        for each in (REAL, *changes):
            values |= each
        if self.size == "small":
            values |= NANO | ({"policy.freeze_pi0_backbone": True} if ADAPTERS.items() <= values.items() else {})
        if not values.get("policy.freeze_pi0_backbone") and "lora" not in values["policy.paligemma_variant"]:
            values["policy.frozen_dtype"] = "float32"  # nothing is frozen
        return apply_config_overrides(presets.get_preset("droid"), values)


def in_process(part: str, setting: Setting) -> dict[str, Any]:
    """Return the result of a part, or the last lines of its error."""
    words = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--size", setting.size]
    words += ["--batch", str(setting.batch), "--repeats", str(setting.repeats)]
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-3:], "wall_s": seconds}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"wall_s": seconds}


def measure(part: str, setting: Setting) -> dict[str, Any]:
    """Return what a part measures, with the device's peak memory where it says so."""
    found = {
        "chunks-pi0": lambda: chunks(setting, {}),
        "chunks-pi05": lambda: chunks(setting, {"policy.kind": "pi05", "data.action_normalization": "quantile"}),
        "policy": lambda: requests(setting),
        "updates-adapters": lambda: updates(setting, ADAPTERS, stored=False),
        "updates-frozen": lambda: updates(setting, FROZEN, stored=True),
        "parity": parity,
    }[part]()
    stats = jax.devices()[0].memory_stats() or {}
    return {"rows": found, "peak_bytes": stats.get("peak_bytes_in_use")}


# -- chunks ------------------------------------------------------------------------------------------------------------


def acting(setting: Setting, changes: dict[str, Any]) -> tuple[TrainConfig, ACRLPDAgent]:
    """Return an agent as it acts, without optimisers, in bfloat16 if it is of full size."""
    config = setting.config(changes)
    agent = build.make_agent(config, DIMS, CAMERAS).acting_only()
    if setting.size == "full":
        policy = jax.tree.map(lambda array: array.astype(jnp.bfloat16), agent.params["policy"])
        agent = dataclasses.replace(agent, params=agent.params | {"policy": policy})
    return config, agent


def chunks(setting: Setting, changes: dict[str, Any]) -> list[dict[str, Any]]:
    config, agent = acting(setting, changes)
    seen = jax.device_put(observations(config, 1, seed=0))

    def chosen(agent: ACRLPDAgent, n: int) -> Any:
        return agents.choose_chunks(agent, seen, jax.random.key(0), num_samples=n)[0]

    rows = []
    for n in CANDIDATES:
        counted = flops.of(functools.partial(chosen, n=n), agent)
        rows.append(timed(f"best of {n}", functools.partial(chosen, agent, n), setting, counted))
    return rows


def requests(setting: Setting) -> list[dict[str, Any]]:
    config, agent = acting(setting, {})
    ones = np.ones(DIMS.state, np.float32)
    stats = {name: NormStats(0 * ones, ones) for name in ("state", "actions")}
    policy = Policy(AgentSampler(agent), build.make_transform(config, stats, DIMS, CAMERAS))
    side = config.policy.image_size
    raw = {
        "state": np.zeros(DIMS.state, np.float32),
        "image": {name: np.zeros((side, side, 3), np.uint8) for name in CAMERAS},
        "prompt": "open the drawer",
    }
    rows = []
    for count in (1, 8):

        def call(count: int = count) -> Any:
            return policy.infer_batch([policy.prepare(raw) for _ in range(count)])[0]["actions"]

        row = timed(f"{count} requests, best of 8", call, setting, None)
        rows.append(row | {"answers_per_s": count / row["p50_s"]})
    return rows


# -- updates -----------------------------------------------------------------------------------------------------------


def updates(setting: Setting, changes: dict[str, Any], *, stored: bool) -> list[dict[str, Any]]:
    """Return the rows of a supervised step and of the agent's updates with the same trainable parameters."""
    kinds: dict[str, dict[str, Any]] = {
        "supervised": {"agent.algorithm": "bc"},
        "best of 8": {},
        "implicit": {"agent.target": "implicit", "agent.temperature.adaptive": False},
    }
    return [updates_of(name, setting, setting.config(changes, kind), stored=stored) for name, kind in kinds.items()]


def updates_of(name: str, setting: Setting, config: TrainConfig, *, stored: bool) -> dict[str, Any]:
    agent, batch = build.make_agent(config, DIMS, CAMERAS), batch_of(config, setting.batch)
    if stored:
        batch = with_prefixes(agent, batch, features_alone=name == "implicit")

    def gradients(agent: ACRLPDAgent) -> Any:
        return agents._gradients(agent, batch, jax.random.key(0), config.agent.loss_weights)

    def call() -> Any:
        nonlocal agent
        agent, metrics = agent.update(batch, jax.random.key(0))
        return metrics["total_loss"]

    counted = flops.of(gradients, agent)
    planned = None if stored else memory.plan(config, dims=DIMS, cameras=CAMERAS).total_bytes
    row = timed(f"{name}, stored prefixes" if stored else name, call, setting, counted)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row | {"samples_per_s": setting.batch / row["p50_s"], "planned_bytes": planned, "peak_bytes_so_far": peak}


def observations(config: TrainConfig, count: int, seed: int) -> Observation:
    rng, policy = np.random.default_rng(seed), config.policy
    side, tokens = policy.image_size, (count, policy.max_token_len)
    return Observation(
        state=rng.normal(size=(count, policy.action_dim or DIMS.state)).astype(np.float32),
        images={name: rng.integers(0, 256, (count, side, side, 3), np.uint8) for name in CAMERAS},
        image_masks={name: np.ones(count, bool) for name in CAMERAS},
        tokenized_prompt=rng.integers(0, policy.vocab_size or 256, tokens).astype(np.int32),
        tokenized_prompt_mask=np.ones(tokens, bool),
    )


def batch_of(config: TrainConfig, count: int) -> ChunkBatch:
    rng, shape = np.random.default_rng(2), (count, config.policy.action_horizon)
    ones = np.ones(count, np.float32)
    made = ChunkBatch(
        observations=observations(config, count, 0),
        next_observations=observations(config, count, 1),
        actions=rng.uniform(-1, 1, (*shape, config.policy.action_dim or DIMS.action)).astype(np.float32),
        rewards=-np.ones(shape, np.float32),
        terminals=np.zeros(shape, np.float32),
        valid=np.ones(shape, np.float32),
        bootstrap_mask=ones,
        sequence_mask=ones,
        episode_id=np.zeros(count, np.int32),
        step_id=np.zeros(count, np.int32),
    )
    return jax.device_put(made)


def with_prefixes(agent: ACRLPDAgent, batch: ChunkBatch, *, features_alone: bool) -> ChunkBatch:
    """Return the batch as a run with a frozen backbone reads it from its store."""

    @jax.jit
    def encoded(agent: ACRLPDAgent, seen: Observation) -> Any:
        policy = agent.nets.modules(agent.params, agent.frozen).policy
        return flow.portable(policy, policy.encode(seen))

    now, after = (encoded(agent, seen) for seen in (batch.observations, batch.next_observations))
    after = (after[0], None, None) if features_alone else after
    return dataclasses.replace(
        batch,
        observations=Observation(state=batch.observations.state, prefix=now),
        next_observations=Observation(state=batch.next_observations.state, prefix=after),
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def parity() -> list[dict[str, Any]]:
    """Return the largest differences of a tiny pi0's chunk and loss on the device from those on the CPU."""
    config = Setting("small", 2, 1).config()
    rows = []
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        kind = apply_config_overrides(config, {"policy.dtype": dtype}).policy
        policy = build.pi0_config(kind, DIMS, CAMERAS).create(nnx.Rngs(0))
        graph, state = nnx.split(policy)
        seen, actions = observations(config, 2, 0), batch_of(config, 2).actions

        def numbers(state: Any, seen: Observation, actions: Any, graph: Any = graph) -> Any:
            policy = nnx.merge(graph, state)
            chunk = policy.sample_actions(jax.random.key(0), seen, num_steps=10)
            return chunk, policy.compute_loss(jax.random.key(1), seen, actions)

        with jax.default_matmul_precision(precision):
            found = [
                jax.device_get(jax.jit(numbers)(*jax.device_put((state, seen, actions), device)))
                for device in (jax.devices()[0], jax.devices("cpu")[0])
            ]
        chunk, loss = (float(np.abs(np.float32(a) - np.float32(b)).max()) for a, b in zip(*found, strict=True))
        rows.append({"name": dtype, "chunk_difference": chunk, "loss_difference": loss})
    return rows


# -- time and the table ------------------------------------------------------------------------------------------------


def timed(name: str, call: Callable[[], Any], setting: Setting, counted: float | None) -> dict[str, Any]:
    """Return the time of the first call and percentiles of the others, with their share of the device's peak."""
    first, _ = machine.seconds(call)
    seconds = sorted(machine.seconds(call)[0] for _ in range(setting.repeats))
    middle = float(np.percentile(seconds, 50))
    row = {"name": name, "first_s": first, "p50_s": middle, "p99_s": float(np.percentile(seconds, 99))}
    if counted is None:
        return row
    share = None if setting.peak is None else counted / middle / setting.peak
    return row | {"gflop": counted / 1e9, "flops_per_s": counted / middle, "share_of_peak": share}


def table(result: dict[str, Any]) -> str:
    device = ", ".join(sorted(set(result["devices"])))
    lines = [f"{result['command']} on {device} ({result['size']}, batch {result['batch']}), jax {result['jax']}", ""]
    for part, found in result["parts"].items():
        if "error" in found:
            lines += [f"{part}: failed", *(f"    {line}" for line in found["error"])]
            continue
        peak = "" if found["peak_bytes"] is None else f", peak memory {found['peak_bytes'] / 1e9:.1f} GB"
        lines.append(f"{part} ({found['wall_s']:.0f} s in all{peak})")
        lines += [f"    {_told(row)}" for row in found["rows"]]
    return "\n".join(lines)


def _told(row: dict[str, Any]) -> str:
    if "p50_s" not in row:
        return f"{row['name']:32} chunk differs by {row['chunk_difference']:.1e}, loss by {row['loss_difference']:.1e}"
    text = (
        f"{row['name']:32} {row['p50_s'] * 1e3:9.2f} ms, p99 {row['p99_s'] * 1e3:9.2f}, first {row['first_s']:6.1f} s"
    )
    if row.get("gflop") is not None:
        share = "" if row["share_of_peak"] is None else f" ({row['share_of_peak']:.2f} of the peak)"
        text += f", {row['flops_per_s'] / 1e12:.2f} TFLOP/s{share}"
    for key, unit in (("samples_per_s", "samples/s"), ("answers_per_s", "answers/s")):
        text += f", {row[key]:.1f} {unit}" if key in row else ""
    if row.get("planned_bytes") is not None:
        text += f", planned {row['planned_bytes'] / 1e9:.1f} GB"
    return text


if __name__ == "__main__":
    main()
