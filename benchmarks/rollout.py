"""Measure environment steps per second: with worker processes, with batched policy calls, and during updates.

    python benchmarks/rollout.py [--workers 0 1 2 4] [--steps 2000] [--preset demo-vision] [--paced] [--json]

The policy is the demo's (nano pi0, best of 16), the task MetaWorld's drawer. There are three comparisons: environments
in this process or in workers, with actions that cost nothing; N environments with one policy call, or with N calls; and
an online phase in step with its updates, or overlapping with them. Workers and overlap need cores to pay off, unless
the environment takes time but no processor, as a robot does: ``--paced`` uses one environment with 20 steps per second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np

from acrlpd.config import CollectConfig, EvalConfig, TrainConfig
from acrlpd.data.statistics import bounds_stats
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make_vector
from acrlpd.envs.rollout import Act, OnlineCollector
from acrlpd.envs.vector import RolloutConfig
from acrlpd.presets import get_preset
from acrlpd.training import build, setup
from acrlpd.training.evaluate import chunk_policy

HORIZON = 5
PACED = Path(__file__).with_name("paced.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 4], help="0: in this process")
    parser.add_argument("--num_envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000, help="environment steps of each measurement")
    parser.add_argument("--online_steps", type=int, default=1000, help="length of each online phase; 0: none")
    parser.add_argument("--preset", default="demo", help="its environment is stepped; also used for the online phase")
    parser.add_argument("--paced", action="store_true", help="online phase in real time, in an environment that waits")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    config = get_preset("demo")
    online = get_preset(arguments.preset)
    speeds = {f"{count} workers": stepping(online, count, arguments) for count in arguments.workers}
    act = demo_policy(config)
    speeds["one call for all"] = acting(config, act, arguments)
    speeds["a call for each"] = acting(config, one_by_one(act), arguments)
    result: dict[str, Any] = {
        **about,
        "preset": arguments.preset,
        "paced": arguments.paced,
        "num_envs": arguments.num_envs,
        "steps_per_s": speeds,
    }
    result["batching_gain"] = speeds["one call for all"] / speeds["a call for each"]
    if arguments.online_steps:
        if arguments.paced:
            online = dataclasses.replace(online, env=EnvConfig(f"custom/{PACED}:make"))
        speeds["online, in step"], waited = training(online, False, arguments)
        speeds["online, overlapping"], still_waited = training(online, True, arguments)
        result |= {
            "overlap_gain": speeds["online, overlapping"] / speeds["online, in step"],
            "share_waiting_in_step": waited,  # share of time spent waiting for the simulator
            "share_waiting_overlapping": still_waited,
        }
    result["load_after"] = machine.describe()["load_average"]
    figures = speeds | {
        name: value for name, value in result.items() if name.startswith(("batching", "overlap", "share"))
    }
    lines = [f"{name:26}{value:10.2f}" for name, value in figures.items()]
    machine.show(result, as_json=arguments.json, table="\n".join(lines))


def stepping(config: TrainConfig, num_workers: int, arguments: argparse.Namespace) -> float:
    rng = np.random.default_rng(0)
    act = lambda observations, numbers: rng.uniform(-1, 1, (len(observations), HORIZON, 4))  # noqa: E731
    return _steps_per_s(config, act, arguments, RolloutConfig(num_workers=num_workers))


def acting(config: TrainConfig, act: Act, arguments: argparse.Namespace) -> float:
    return _steps_per_s(config, act, arguments, RolloutConfig())


def _steps_per_s(config: TrainConfig, act: Act, arguments: argparse.Namespace, rollout: RolloutConfig) -> float:
    assert config.env is not None, "the demo has an environment"
    environments = make_vector(config.env, arguments.num_envs, rollout)
    collector = OnlineCollector(environments, seed=0, execute_horizon=HORIZON)
    collector.collect(act)  # compiles, and starts every worker
    steps, start = 0, time.perf_counter()
    while steps < arguments.steps:
        steps += collector.collect(act).num_steps
    elapsed = time.perf_counter() - start
    collector.close()
    return steps / elapsed


def demo_policy(config: TrainConfig) -> Act:
    dims = build.Dims(state=39, action=4)
    stats = {name: bounds_stats(-np.ones(size), np.ones(size)) for name, size in (("state", 39), ("actions", 4))}
    agent = build.make_agent(config, dims, ())
    return chunk_policy(agent, build.make_transform(config, stats, dims), jax.random.key(0), mode="greedy")


def one_by_one(act: Act) -> Act:
    def each(observations: list[Any], numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([act([one], numbers[row : row + 1]) for row, one in enumerate(observations)])

    return each


def training(config: TrainConfig, overlap: bool, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the online phase's steps per second by the run's own clocks (updates, action choice and waiting for the
    simulator, without compilation), and the share of that waiting."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # the run reports to stdout
        config = dataclasses.replace(
            config,
            run_dir=folder,
            data=dataclasses.replace(config.data, collect=CollectConfig(episodes=5, policy="random")),
            eval=EvalConfig(episodes=1, frequency=10**9, num_envs=1),
            offline_steps=1,
            online_steps=arguments.online_steps,
            online_envs=1 if arguments.paced else arguments.num_envs,
            rollout=RolloutConfig(num_workers=1),
            overlap_rollouts=overlap,
        )
        summary = setup.make_trainer(config).train()
    spent = summary["breakdown"]
    total = sum(spent.get(f"{name}_s", 0.0) for name in ("update", "act", "simulator", "data"))
    return summary["env_steps"] / total, spent["simulator_s"] / total


if __name__ == "__main__":
    main()
