"""Evaluation in the simulator: success with its Wilson interval, always on the same seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from acrlpd.agents import acrlpd
from acrlpd.agents.acrlpd import ACRLPDAgent, ActingMode
from acrlpd.data.transforms import Compose, Data, Normalize, Transform, to_observation
from acrlpd.envs.env import Obs
from acrlpd.envs.rollout import Act, Rollout, Seconds, rollout
from acrlpd.envs.vector import VectorEnv

OnChoice = Callable[[Int[np.ndarray, " n"], Mapping[str, Float[np.ndarray, " n"]]], None]


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
    lost: int = 0  # episodes whose worker died; they count nowhere else

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

    def to_dict(self) -> dict[str, float]:
        """All of it, for JSON."""
        return self.summary() | {
            name: getattr(self, name) for name in ("return_mean", "return_std", "length_mean", "lost")
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
            "eval/lost_episodes": self.lost,
        }

    def __str__(self) -> str:
        lost = f", {self.lost} lost" if self.lost else ""
        return f"{self.successes}/{self.episodes} = {self.success:.0%} [{self.low:.0%}, {self.high:.0%}]{lost}"


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
    environments: VectorEnv,
    seeds: Sequence[int],
    *,
    mode: ActingMode,
    rng: PRNGKeyArray,
    execute_horizon: int,
    num_samples: int | None = None,
    action_noise: float = 0.0,
    on_choice: OnChoice | None = None,
    seconds: Seconds | None = None,
) -> tuple[Evaluation, list[Rollout]]:
    """Runs every seed once, the environments side by side with one batched policy call a chunk."""
    act = chunk_policy(
        agent, transform, rng, mode=mode, num_samples=num_samples, action_noise=action_noise, on_choice=on_choice
    )
    rollouts = rollout(environments, act, seeds, execute_horizon=execute_horizon, seconds=seconds)
    return summarize(rollouts, lost=len(seeds) - len(rollouts)), rollouts


def summarize(rollouts: Sequence[Rollout], *, lost: int = 0) -> Evaluation:
    if not rollouts:
        raise ValueError(f"no episode was finished, and {lost} were lost with their workers: there is nothing to judge")
    successes = sum(each.success for each in rollouts)
    returns = np.array([each.returns for each in rollouts])
    return Evaluation(
        successes,
        len(rollouts),
        *wilson(successes, len(rollouts)),
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        length_mean=float(np.mean([each.length for each in rollouts])),
        lost=lost,
    )


fold_in = jax.jit(jax.random.fold_in)  # compiled, for the plain one takes as long as a tenth of a choice


def chunk_policy(
    agent: ACRLPDAgent,
    transform: Transform,
    rng: PRNGKeyArray,
    *,
    mode: ActingMode,
    num_samples: int | None = None,
    action_noise: float = 0.0,
    on_choice: OnChoice | None = None,
) -> Act:
    """The agent as a function from raw observations to chunks in the environment's units; call k uses key k.

    ``action_noise`` is the deviation of Gaussian noise on every executed action, in normalized units. ``on_choice`` is
    told the numbers of the episodes and the values by which their chunks were chosen; imitation (bc) has none.
    """
    agent = dataclasses.replace(agent, opt_state={})  # acting needs none, and a call walks through all it is given
    calls = 0

    def act(observations: list[Obs], numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n h a"]:
        nonlocal calls
        calls += 1
        data = transform(stack(observations))
        key = fold_in(rng, calls)
        chosen, values = acrlpd.act(agent, to_observation(data), key, mode=mode, num_samples=num_samples)
        chunks = np.asarray(chosen)
        if action_noise:
            noise_rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            chunks = chunks + action_noise * noise_rng.standard_normal(chunks.shape, np.float32)
        if on_choice is not None:
            on_choice(numbers, {name: np.asarray(value) for name, value in values.items()})
        return transform.inverse({"state": data["state"], "actions": chunks})["actions"]

    return act


@dataclasses.dataclass(frozen=True)
class ObservationNoise:
    """A transform: Gaussian noise of ``deviation`` on the normalized state, and on pictures as the model scales them.

    Each call draws anew, in the order of calls from ``rng``.
    """

    deviation: float
    rng: np.random.Generator

    def __call__(self, data: Data) -> Data:
        state = np.asarray(data["state"])
        images = {camera: self._on_picture(np.asarray(image)) for camera, image in data.get("image", {}).items()}
        return data | {"state": state + self._draw(state.shape), "image": images}

    def inverse(self, data: Data) -> Data:
        return data

    def _on_picture(self, image: np.ndarray) -> np.ndarray:
        noisy = image + 127.5 * self._draw(image.shape)  # uint8 stands for -1 .. 1
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.deviation * self.rng.standard_normal(shape, np.float32)


def with_observation_noise(transform: Transform, deviation: float, seed: int) -> Compose:
    """The same transform with noise right behind its normalization: before pi0.5 writes the state into its prompt."""
    if not isinstance(transform, Compose) or not any(isinstance(step, Normalize) for step in transform.transforms):
        raise ValueError("observation noise is in normalized units: the transform must be a Compose with a Normalize")
    place = len(transform.before(Normalize).transforms) + 1
    steps = list(transform.transforms)
    return Compose([*steps[:place], ObservationNoise(deviation, np.random.default_rng(seed)), *steps[place:]])


def stack(observations: Sequence[Obs]) -> dict[str, Any]:
    """Unbatched observations as one batch in the data-dictionary form."""
    return {
        "state": np.stack([obs["state"] for obs in observations]),
        "image": {
            camera: np.stack([obs["image"][camera] for obs in observations]) for camera in observations[0]["image"]
        },
        "prompt": np.array([obs["prompt"] for obs in observations]),
    }
