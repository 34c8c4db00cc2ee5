"""Evaluation in the simulator, always on the same seeds: the success rate with its Wilson interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Shaped, UInt32

from acrlpd.agents.agent import ACRLPDAgent, ActingMode, choose_chunks
from acrlpd.data.view.transforms import Compose, Data, Normalize, Transform, to_observation
from acrlpd.envs.env import Obs
from acrlpd.envs.rollout import Act, Rollout, Seconds, rollout
from acrlpd.envs.vector import VectorEnv

OnChoice = Callable[[Int[np.ndarray, " n"], Mapping[str, Shaped[np.ndarray, "n ..."]]], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one policy on a list of seeds."""

    successes: int
    episodes: int
    low: float  # Wilson 95 % interval of the success rate
    high: float
    return_mean: float
    return_std: float
    length_mean: float
    lost: int = 0  # episodes whose worker died or whose reset failed; no other field counts them

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
        """Return the success rate and every field, for JSON."""
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
    """Return Wilson's score interval of a success rate (Wilson 1927); ``z`` is the normal quantile of its coverage.

    ``wilson(0, 50)`` is (0, 0.071), not (0, 0): 50 failures do not prove that the policy never succeeds.
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
    seconds: Seconds | None = None,
    **options: Any,
) -> tuple[Evaluation, list[Rollout]]:
    """Run one episode per seed in parallel environments, with one batched policy call per chunk.

    An episode depends only on ``rng`` and its seed, not on what runs beside it. ``options`` go to ``chunk_policy``.
    """
    act = chunk_policy(agent, transform, EpisodeDraws(rng, seeds), mode=mode, **options)
    rollouts = rollout(environments, act, seeds, execute_horizon=execute_horizon, seconds=seconds)
    return summarize(rollouts, lost=len(seeds) - len(rollouts)), rollouts


def summarize(rollouts: Sequence[Rollout], *, lost: int = 0) -> Evaluation:
    if not rollouts:
        raise ValueError(f"no episode was finished, and {lost} were lost: there is nothing to judge")
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


def outcomes(rollouts: Sequence[Rollout]) -> dict[str, bool]:
    """Return whether each episode succeeded, by its seed as text, because JSON keys are text."""
    return {str(each.seed): each.success for each in rollouts}


fold_in = jax.jit(jax.random.fold_in)  # compiled: the plain function takes a tenth of the time of choosing a chunk


@jax.jit
def _fold_in_pairs(rng: PRNGKeyArray, seeds: UInt32[Array, " n"], chunks: UInt32[Array, " n"]) -> Key[Array, " n"]:
    return jax.vmap(lambda seed, chunk: jax.random.fold_in(jax.random.fold_in(rng, seed), chunk))(seeds, chunks)


@dataclasses.dataclass(frozen=True)
class ChunkDraws:
    """The randomness of one chunk of each of n episodes."""

    rng: PRNGKeyArray
    seeds: UInt32[np.ndarray, " n"]
    chunks: UInt32[np.ndarray, " n"]

    @property
    def keys(self) -> Key[Array, " n"]:
        return _fold_in_pairs(self.rng, self.seeds, self.chunks)

    def generators(self, purpose: int) -> list[np.random.Generator]:
        """Return one host noise generator per episode; generators of different purposes are independent."""
        words = np.asarray(jax.random.key_data(self.rng)).tolist()
        pairs = zip(self.seeds.tolist(), self.chunks.tolist(), strict=True)
        return [np.random.default_rng((purpose, *words, seed, chunk)) for seed, chunk in pairs]


@dataclasses.dataclass
class EpisodeDraws:
    """The randomness of a policy, which depends only on an episode's seed and the index of the chunk in it.

    So it does not matter which episodes run side by side, or in which order they start.
    """

    rng: PRNGKeyArray
    seeds: Sequence[int] | None = None  # by episode number; None: the number is the seed
    counts: dict[int, int] = dataclasses.field(default_factory=dict)  # chunks so far, by episode number

    def next(self, numbers: Int[np.ndarray, " n"]) -> ChunkDraws:
        """Return the randomness of the next chunk of each of these episodes; the number -1 is padding."""
        chunks = [self.counts.get(number, 0) for number in numbers.tolist()]
        self.counts |= {number: chunk + 1 for number, chunk in zip(numbers.tolist(), chunks, strict=True)}
        seeds = [self._seed(number) for number in numbers.tolist()]
        return ChunkDraws(self.rng, np.array(seeds, np.uint32), np.array(chunks, np.uint32))

    def _seed(self, number: int) -> int:
        seed = number if self.seeds is None or number < 0 else self.seeds[number]
        return seed % 2**32


def chunk_policy(
    agent: ACRLPDAgent,
    transform: Transform,
    draws: PRNGKeyArray | EpisodeDraws,
    *,
    mode: ActingMode,
    num_samples: int | None = None,
    observation_noise: float = 0.0,
    action_noise: float = 0.0,
    on_choice: OnChoice | None = None,
) -> Act:
    """Return the agent as a function from raw observations to chunks in the environment's units.

    Several policies that act in one episode share their ``draws``; a key stands for fresh ones. ``observation_noise``
    and ``action_noise`` are standard deviations of Gaussian noise in normalized units, on what the policy sees and on
    every executed action. ``on_choice`` is called with the episode numbers and the values by which their chunks were
    chosen; imitation ("bc") has no such values.
    """
    agent = dataclasses.replace(agent, opt_state={})  # acting does not need it, and every call flattens its arguments
    episodes = draws if isinstance(draws, EpisodeDraws) else EpisodeDraws(draws)

    def act(observations: list[Obs], numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n h a"]:
        drawn, seen = episodes.next(numbers), transform
        if observation_noise:
            seen = with_observation_noise(transform, observation_noise, drawn.generators(ON_OBSERVATIONS))
        data = seen(stack(observations))
        chosen, values = choose_chunks(agent, to_observation(data), drawn.keys, mode=mode, num_samples=num_samples)
        chunks = np.asarray(chosen)
        if action_noise:
            noise = [rng.standard_normal(chunks.shape[1:], np.float32) for rng in drawn.generators(ON_ACTIONS)]
            chunks = chunks + action_noise * np.stack(noise)
        if on_choice is not None:
            on_choice(numbers, {name: np.asarray(value) for name, value in values.items()})
        return transform.inverse({"state": data["state"], "actions": chunks})["actions"]

    return act


ON_OBSERVATIONS, ON_ACTIONS = 0, 1  # the purposes of ``ChunkDraws.generators``


@dataclasses.dataclass(frozen=True)
class ObservationNoise:
    """A transform that adds Gaussian noise to the normalized state, and to images in the model's range -1 .. 1.

    ``deviation`` is the standard deviation. Row i of a batch draws from ``rngs[i]``.
    """

    deviation: float
    rngs: Sequence[np.random.Generator]

    def __call__(self, data: Data) -> Data:
        state = np.asarray(data["state"])
        images = {camera: self._on_picture(np.asarray(image)) for camera, image in data.get("image", {}).items()}
        return data | {"state": state + self._draw(state.shape), "image": images}

    def inverse(self, data: Data) -> Data:
        return data

    def _on_picture(self, image: np.ndarray) -> np.ndarray:
        noisy = image + 127.5 * self._draw(image.shape)  # the model maps uint8 to -1 .. 1
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.deviation * np.stack([rng.standard_normal(shape[1:], np.float32) for rng in self.rngs])


def with_observation_noise(transform: Transform, deviation: float, rngs: Sequence[np.random.Generator]) -> Compose:
    """Return ``transform`` with noise right after its normalization, before pi0.5 writes the state into the prompt."""
    if not isinstance(transform, Compose) or not any(isinstance(step, Normalize) for step in transform.transforms):
        raise ValueError("observation noise is in normalized units: the transform must be a Compose with a Normalize")
    place = len(transform.before(Normalize).transforms) + 1
    steps = list(transform.transforms)
    return Compose([*steps[:place], ObservationNoise(deviation, rngs), *steps[place:]])


def stack(observations: Sequence[Obs]) -> dict[str, Any]:
    """Stack unbatched observations into one batch, as a data dictionary."""
    return {
        "state": np.stack([obs["state"] for obs in observations]),
        "image": {
            camera: np.stack([obs["image"][camera] for obs in observations]) for camera in observations[0]["image"]
        },
        "prompt": np.array([obs["prompt"] for obs in observations]),
    }
