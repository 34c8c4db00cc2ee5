"""Measure latency and throughput of the policy server for many clients, with and without batching, best of 8 and of 1.

    python benchmarks/serving.py [--clients 1 8 32] [--seconds 5] [--cameras 0] [--json]

An untrained nano pi0 is written to a checkpoint and served by ``acrlpd serve`` in its own process; all clients share
this process. Each sends the next request as soon as it has an answer. The bare call is the compiled model for one
observation and for a batch of 8, without transforms or network, in this process; the time of eight single calls over
that of one batch is about what batching can gain. A request with 8 candidates is already a batch, so it gains less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
from websockets.asyncio.client import connect

from acrlpd import deploy
from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, TrainConfig, to_dict
from acrlpd.data.view.normalize import NormStats
from acrlpd.models.critic import CriticConfig
from acrlpd.presets import NANO
from acrlpd.serving import codec
from acrlpd.training import build
from acrlpd.training.checkpoint import ACRLPDCheckpointManager

STATE_DIM, ACTION_DIM = 39, 4  # as in MetaWorld
STATS = {"state": NormStats(np.zeros(STATE_DIM), np.ones(STATE_DIM)), "actions": NormStats(np.zeros(4), np.ones(4))}
BATCHED, SINGLE = 8, 1  # requests per call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each row's measurement")
    parser.add_argument("--cameras", type=int, default=0, help="pictures of 64 x 64 in an observation")
    parser.add_argument("--samples", type=int, default=8, help="candidates of the throughput rows")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cameras = tuple(f"camera_{k}" for k in range(arguments.cameras))
    about = machine.describe()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), cameras)
        every_samples = sorted({1, arguments.samples})
        bare = {n: bare_call_ms(folder, n, cameras) for n in every_samples}
        for samples, batch in itertools.product(every_samples, (BATCHED, SINGLE)):
            with served(folder, samples, batch) as port:
                for clients in arguments.clients:
                    measured = asyncio.run(measure(port, clients, arguments.seconds, cameras))
                    rows.append({"samples": samples, "max_batch": batch, "clients": clients, **measured})
    result = {**about, "load_after": machine.describe()["load_average"], "bare_call_ms": bare, "rows": rows}
    machine.show(result | ratios(rows, bare), as_json=arguments.json, table=table(result))


def write_checkpoint(folder: Path, cameras: tuple[str, ...]) -> None:
    config = TrainConfig(
        policy=dataclasses.replace(NANO, max_token_len=8),
        agent=AgentConfig(critic=CriticConfig(num_critics=10, hidden_dims=(128, 128)), flow_steps=5),
        data=DataConfig(path="none", action_normalization="z_score"),
        online_steps=0,
    )
    agent = build.make_agent(config, build.Dims(STATE_DIM, ACTION_DIM), cameras)
    manager = ACRLPDCheckpointManager(folder)
    run = {"config": to_dict(config), "cameras": list(cameras)}
    manager.save(dataclasses.replace(agent, opt_state={}), asset_id="nano", norm_stats=STATS, run=run)
    manager.wait()
    manager.close()


def observation(cameras: tuple[str, ...]) -> dict[str, Any]:
    return {
        "state": np.zeros(STATE_DIM, np.float32),
        "image": {camera: np.zeros((64, 64, 3), np.uint8) for camera in cameras},
        "prompt": "open the drawer",
    }


def bare_call_ms(folder: str, samples: int, cameras: tuple[str, ...]) -> dict[int, float]:
    """Return the milliseconds of a call for one observation and for a batch, by batch size."""
    policy = deploy.trained_policy(deploy.load_trained(folder), deploy.ActingOptions(num_samples=samples))
    request = policy.prepare(observation(cameras))
    medians = {}
    for size in (SINGLE, BATCHED):
        times = [policy.infer_batch([request] * size)[0]["policy_timing"]["infer_ms"] for _ in range(100)]
        medians[size] = float(np.median(times[5:]))
    return medians


@contextlib.contextmanager
def served(folder: str, samples: int, batch: int) -> Iterator[int]:
    flags = ["--checkpoint", folder, "--port", "0", "--num_samples", str(samples), "--max_batch_size", str(batch)]
    command = [sys.executable, "-m", "acrlpd.cli.main", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait(60)


async def measure(port: int, clients: int, seconds: float, cameras: tuple[str, ...]) -> dict[str, float]:
    """Return quantiles of the latency and answers per second, after a warm-up of one second."""
    message = codec.pack(observation(cameras))
    latencies: list[float] = []
    begin = time.perf_counter() + 1.0

    async def ask() -> None:
        async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
            await connection.recv()
            while (start := time.perf_counter()) < begin + seconds:
                await connection.send(message)
                answer = await connection.recv()
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                if start >= begin:
                    latencies.append((time.perf_counter() - start) * 1000)

    await asyncio.gather(*(ask() for _ in range(clients)))
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "answers_per_s": len(latencies) / seconds}


def ratios(rows: list[dict[str, Any]], bare: dict[int, dict[int, float]]) -> dict[str, Any]:
    """Return the gain of batching, by candidates and clients, and best of N over best of 1, by clients."""
    rate = {(row["samples"], row["max_batch"], row["clients"]): row["answers_per_s"] for row in rows}
    p50 = {(row["samples"], row["max_batch"], row["clients"]): row["p50_ms"] for row in rows}
    clients = sorted({row["clients"] for row in rows})
    most = max(bare)
    return {
        "bare_batched_over_single": {n: BATCHED * ms[SINGLE] / ms[BATCHED] for n, ms in bare.items()},
        "batched_over_single": {n: {c: rate[n, BATCHED, c] / rate[n, SINGLE, c] for c in clients} for n in bare},
        "best_of_n_over_best_of_1_ms": {c: p50[most, BATCHED, c] / p50[1, BATCHED, c] for c in clients},
    }


def table(result: dict[str, Any]) -> str:
    bare = "   ".join(
        f"best of {n}: {ms[SINGLE]:.1f} ms, a batch {ms[BATCHED]:.1f} ms" for n, ms in result["bare_call_ms"].items()
    )
    lines = [
        f"bare call   {bare}",
        f"{'best of':>8}{'batch':>7}{'clients':>9}{'p50 ms':>9}{'p99 ms':>9}{'answers/s':>11}",
    ]
    lines += [
        f"{row['samples']:>8}{row['max_batch']:>7}{row['clients']:>9}{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}"
        f"{row['answers_per_s']:>11.1f}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
