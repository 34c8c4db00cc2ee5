"""Evaluation in the simulator: success with its Wilson interval, always on the same seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from acrlpd.agents.acrlpd import ACRLPDAgent, ActingMode
from acrlpd.data.transforms import Transform, to_observation
from acrlpd.envs.env import Environment, Obs
from acrlpd.envs.rollout import Act, Rollout, Seconds, rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of one policy on a list of seeds."""

    successes: int
    episodes: int
    low: float  # Wilson 95 % interval of the success rate
    high: float
    return_mean: float
    return_std: float
    length_mean: float

    @property
    def success(self) -> float:
        return self.successes / self.episodes

    def summary(self) -> dict[str, float]:
        return {
            "success": self.success,
            "successes": self.successes,
            "episodes": self.episodes,
            "low": self.low,
            "high": self.high,
        }

    def metrics(self) -> dict[str, float]:
        return {
            "eval/success_rate": self.success,
            "eval/low": self.low,
            "eval/high": self.high,
            "eval/episodes": self.episodes,
            "eval/episode_reward_mean": self.return_mean,
            "eval/episode_reward_std": self.return_std,
            "eval/episode_length_mean": self.length_mean,
        }

    def __str__(self) -> str:
        return f"{self.successes}/{self.episodes} = {self.success:.0%} [{self.low:.0%}, {self.high:.0%}]"


def wilson(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927); ``z`` of the normal for its coverage.

    ``wilson(0, 50)`` is (0, 0.071) and not (0, 0): no success in 50 does not prove that there is none.
    """
    if episodes < 1:
        raise ValueError("an interval needs at least one episode")
    rate = successes / episodes
    scale = 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    agent: ACRLPDAgent,
    transform: Transform,
    environments: Sequence[Environment],
    seeds: Sequence[int],
    *,
    mode: ActingMode,
    rng: PRNGKeyArray,
    execute_horizon: int,
    seconds: Seconds | None = None,
) -> tuple[Evaluation, list[Rollout]]:
    """Runs every seed once, the environments side by side with one batched policy call a chunk."""
    act = chunk_policy(agent, transform, rng, mode=mode)
    rollouts = rollout(environments, act, seeds, execute_horizon=execute_horizon, seconds=seconds)
    return summarize(rollouts), rollouts


def summarize(rollouts: Sequence[Rollout]) -> Evaluation:
    successes = sum(each.success for each in rollouts)
    returns = np.array([each.returns for each in rollouts])
    return Evaluation(
        successes,
        len(rollouts),
        *wilson(successes, len(rollouts)),
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        length_mean=float(np.mean([each.length for each in rollouts])),
    )


def chunk_policy(agent: ACRLPDAgent, transform: Transform, rng: PRNGKeyArray, *, mode: ActingMode) -> Act:
    """The agent as a function from raw observations to chunks in the environment's units; call k uses key k."""
    calls = 0

    def act(observations: list[Obs], indices: Any) -> Float[np.ndarray, "n h a"]:
        nonlocal calls
        calls += 1
        data = transform(stack(observations))
        chunks = agent.sample_actions(to_observation(data), jax.random.fold_in(rng, calls), mode=mode)
        return transform.inverse({"state": data["state"], "actions": np.asarray(chunks)})["actions"]

    return act


def stack(observations: Sequence[Obs]) -> dict[str, Any]:
    """Unbatched observations as one batch in the data-dictionary form."""
    return {
        "state": np.stack([obs["state"] for obs in observations]),
        "image": {
            camera: np.stack([obs["image"][camera] for obs in observations]) for camera in observations[0]["image"]
        },
        "prompt": np.array([obs["prompt"] for obs in observations]),
    }
