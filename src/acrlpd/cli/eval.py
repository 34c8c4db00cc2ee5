"""``acrlpd eval --checkpoint PATH``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

import jax
import tyro

from acrlpd.training import setup
from acrlpd.training.evaluate import evaluate


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """Success rate of a checkpoint in its simulator."""

    checkpoint: str  # a run (runs/demo), its checkpoints folder, or the folder of one step
    episodes: int | None = None  # None: as the run's own final evaluations
    first_seed: int | None = None  # None: the run's own, so results compare seed by seed
    mode: Literal["greedy", "explore", "bc"] = "greedy"  # bc: one sample of the flow, without the critic
    num_envs: int | None = None
    seed: int = 0  # of the policy's noise
    json: bool = False  # print one JSON object instead of a sentence


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(EvalArguments, args=argv, prog="acrlpd eval")
    loaded = setup.load_checkpoint(arguments.checkpoint)
    config = loaded.config
    first = config.eval.first_seed if arguments.first_seed is None else arguments.first_seed
    episodes = arguments.episodes or config.eval.episodes
    environments = setup.make_environments(config, min(episodes, arguments.num_envs or config.eval.num_envs))
    result, _ = evaluate(
        loaded.agent,
        loaded.transform,
        environments,
        range(first, first + episodes),
        mode=arguments.mode,
        rng=jax.random.key(arguments.seed),
        execute_horizon=config.execute_horizon or config.policy.action_horizon,
    )
    if arguments.json:
        print(json.dumps({"checkpoint": arguments.checkpoint, "step": loaded.step, **result.summary()}))
    else:
        print(f"step {loaded.step}, {arguments.mode}: success {result}")
    return 0
