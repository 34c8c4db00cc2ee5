"""The quality of critics on episodes that they were not trained on, and how strongly to follow them.

Whoever seeks the best of N chunks finds errors of the critics, too, and what Q says of that chunk is then too good. So
half of the critics choose and guide, and the other half judge what was chosen. What no episode shows, members of an
ensemble value differently: a standard deviation of all of them is subtracted from what the judges say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from acrlpd.agents import candidates, sampling
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.extraction import Guide, Modules
from acrlpd.config import TrainConfig
from acrlpd.data import chunks
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.transforms import Transform, to_observation
from acrlpd.models import flow
from acrlpd.models.critic import CriticNetworks
from acrlpd.serving.export import keep_critics
from acrlpd.training import agreement
from acrlpd.training.agreement import Bin
from acrlpd.types import Observation

COUNTS = (1, 2, 4, 8, 16, 32)  # numbers of candidates that are tried
WEIGHTS = (0.0, 0.1, 0.3, 1.0)  # of the guidance
STATES = 256  # at which samples are drawn, spread over the held-out episodes


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to choose: N candidates, and the weight of Q's gradient in each."""

    samples: int
    guidance: float

    def __str__(self) -> str:
        return f"N {self.samples}, guidance {self.guidance:g}"


SETTINGS = tuple(Setting(samples, weight) for samples in COUNTS for weight in WEIGHTS)  # the cheapest first


@dataclasses.dataclass(frozen=True)
class Tried:
    """The judges' values of the chunks of one setting, in units of Q, above plain samples at the same states."""

    setting: Setting
    gain: float  # of the mean over the judges
    cautious: float  # the same after a standard deviation of all critics
    error: float  # standard error of ``cautious`` over episodes
    better: float  # share of the states at which the chosen chunk is better than the mean plain sample


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The quality of the critics on held-out episodes, and the setting that was chosen."""

    successes: int
    failures: int
    auc: float | None  # chance that the mean Q of a success lies above that of a failure; None: one kind is missing
    auc_interval: tuple[float, float] | None  # 95 %
    auc_chunks: float | None  # the same for Q of the recorded chunk above plain samples: what of it is not the state's
    auc_chunks_interval: tuple[float, float] | None
    calibration_error: float  # mean over chunks of the distance between a bin's mean Q and its mean return
    overestimation: float  # mean of Q - return
    return_std: float  # of the returns, for comparison
    bins: tuple[Bin, ...]
    plain_std: float  # mean standard deviation of Q among plain samples at one state
    tried: tuple[Tried, ...]
    chosen: Setting
    reason: str  # why it was chosen

    @property
    def can_tell(self) -> bool:
        """Return whether Q ranks successes above failures by more than chance brings."""
        return self.auc_interval is not None and self.auc_interval[0] > 0.5

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"can_tell": self.can_tell}


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """The chunks of the held-out episodes that an executing policy would have looked at."""

    episode: Int[np.ndarray, " c"]
    success: Float[np.ndarray, " n"]  # of each episode
    returns: Float[np.ndarray, " c"]  # from the chunk's start to the end of the episode
    q: Float[np.ndarray, " c"]
    q_sampled: Float[np.ndarray, " c"]  # NaN where nothing was sampled


def judge(
    config: TrainConfig,
    agent: ACRLPDAgent,
    transform: Transform,
    stores: Sequence[tuple[EpisodeStore, Sequence[bool]]],
) -> Verdict:
    """Return what held-out episodes say of the agent's critics, and the setting to act with.

    ``stores`` are the held-out episodes of each data set, with their outcomes.
    """
    agent = dataclasses.replace(agent, opt_state={})
    found = _record(config, agent, transform, stores)
    sampled = _sample(agent, found.states, jax.random.key(config.seed))
    tried = _tried(sampled, found.recorded.episode[found.chunks])
    recorded = found.recorded
    recorded.q_sampled[found.chunks] = sampled.q_mean
    whole = _auc(recorded, recorded.q)
    apart = _auc(recorded, recorded.q - recorded.q_sampled)
    bins = agreement.calibration(recorded.q, recorded.returns)
    chosen, reason = _choose(tried, whole[1])
    successes = int(recorded.success.sum())
    return Verdict(
        successes,
        len(recorded.success) - successes,
        *whole,
        *apart,
        calibration_error=sum(each.count * abs(each.q - each.returns) for each in bins) / len(recorded.q),
        overestimation=float(np.mean(recorded.q - recorded.returns)),
        return_std=float(np.std(recorded.returns)),
        bins=bins,
        plain_std=float(np.mean(sampled.q_std)),
        tried=tuple(tried),
        chosen=chosen,
        reason=reason,
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    recorded: _Recorded
    states: list[Observation]  # at which samples are drawn
    chunks: Int[np.ndarray, " s"]  # the recorded chunks that start there


def _record(
    config: TrainConfig,
    agent: ACRLPDAgent,
    transform: Transform,
    stores: Sequence[tuple[EpisodeStore, Sequence[bool]]],
) -> _Found:
    """Value every recorded chunk, and keep the observations of ``STATES`` of them."""
    starts = [(store, *_starts(store, config.executed_steps)) for store, _ in stores]
    total = sum(len(rows) for _, rows, _ in starts)
    kept = np.unique(np.linspace(0, total - 1, min(STATES, total)).round().astype(np.int64))
    q, returns, episode, success, states = [], [], [], [], []
    done = first = 0
    for (store, rows, own), (_, outcomes) in zip(starts, stores, strict=True):
        for size, part in _parts(rows, min(config.data.batch_size, 64)):
            observation, actions = _read(config, store, transform, part)
            q.append(np.asarray(_value(agent, observation, actions))[:size])
            mine = kept[(kept >= done) & (kept < done + size)] - done
            if len(mine):
                states.append(_rows(observation, mine))
            done += size
        discount = config.agent.discount
        ends = zip(store.starts, store.ends, strict=True)
        after = np.concatenate([agreement.discounted_returns(store.rewards[a:b], discount) for a, b in ends])
        returns.append(after[rows])
        episode.append(own + first)
        success += list(outcomes)
        first += store.num_episodes
    numbers = np.concatenate(episode)
    values = np.concatenate(q)
    recorded = _Recorded(
        numbers, np.array(success, float), np.concatenate(returns), values, np.full(len(values), np.nan)
    )
    return _Found(recorded, states, kept)


def _starts(store: EpisodeStore, executed: int) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Return the rows at which an executing policy would look, and the episode of each."""
    rows = np.concatenate([np.arange(a, b, executed) for a, b in zip(store.starts, store.ends, strict=True)])
    return rows, store.episode_index(rows)


def _parts(rows: Int[np.ndarray, " c"], size: int) -> Iterator[tuple[int, Int[np.ndarray, " b"]]]:
    """Yield blocks of one size, of which the last one repeats its last row, with the number that counts."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield len(part), np.concatenate([part, np.repeat(part[-1:], size - len(part))])


def _read(
    config: TrainConfig, store: EpisodeStore, transform: Transform, rows: Int[np.ndarray, " b"]
) -> tuple[Observation, Float[np.ndarray, "b h a"]]:
    horizon = config.policy.action_horizon
    raw = chunks.gather(store, rows, horizon, backup_horizon=config.critic_horizon, next_images=False)
    data = transform({key: raw[key] for key in ("state", "actions", "image", "prompt")})
    return to_observation(data), np.asarray(data["actions"], np.float32)


def _rows(observation: Observation, rows: Int[np.ndarray, " s"]) -> Observation:
    return jax.tree.map(lambda array: array[rows], observation)


@jax.jit
def _value(agent: ACRLPDAgent, observation: Observation, actions: Float[Array, "b h a"]) -> Float[Array, " b"]:
    modules = agent.acting_modules()
    prefix = flow.encode(modules.policy, observation)
    return modules.critic(prefix.features, prefix.state, actions[None]).mean(axis=0)[0]


@struct.dataclass
class _Sampled:
    """Q of samples at each state: of plain ones, and of those that each of ``SETTINGS`` chooses."""

    q_mean: Float[Array, " s"]  # of plain samples, by all critics
    q_std: Float[Array, " s"]  # over these samples
    plain: Float[Array, "s two"]  # of plain samples: by the judges, and the cautious value
    chosen: Float[Array, "s settings two"]  # likewise


def _sample(agent: ACRLPDAgent, states: Sequence[Observation], rng: PRNGKeyArray) -> _Sampled:
    """Sample at every state, in blocks of one size, so that one program does it."""
    size = max(len(state.state) for state in states)
    parts = []
    for number, state in enumerate(states):
        count = len(state.state)
        padded = _rows(state, np.minimum(np.arange(size), count - 1))
        found = jax.device_get(_sample_block(agent, padded, jax.random.fold_in(rng, number)))
        parts.append(jax.tree.map(lambda array, count=count: array[:count], found))
    return cast(_Sampled, jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))


@jax.jit
def _sample_block(agent: ACRLPDAgent, observation: Observation, rng: PRNGKeyArray) -> _Sampled:
    config = dataclasses.replace(agent.config, guidance_weights=WEIGHTS, candidate_flow_steps=None)
    modules, everyone = _divided(agent)
    prefix = flow.encode(modules.policy, observation)
    noise = sampling.draw(jax.random.normal, rng, max(COUNTS), len(prefix.state), agent.nets.action_shape)
    every = jnp.repeat(noise, len(WEIGHTS), axis=0)  # candidates take the weights in turn
    samples, scores = candidates.propose(modules, config, prefix, every, config.flow_steps)
    judged = modules.critic.judged(samples)
    q = everyone(prefix.features, prefix.state, samples)
    values = jnp.stack(_judged(q), axis=-1)  # [n b two]

    def chosen(setting: Setting) -> Float[Array, "b two"]:
        first = WEIGHTS.index(setting.guidance)
        mine = slice(first, setting.samples * len(WEIGHTS), len(WEIGHTS))
        eligible = candidates.among_typical(config, judged[mine], scores[mine])
        return jnp.take_along_axis(values[mine], jnp.argmax(eligible, axis=0)[None, :, None], axis=0)[0]

    plain = slice(0, None, len(WEIGHTS))
    mean = q.mean(axis=0)[plain]
    return _Sampled(
        mean.mean(axis=0), mean.std(axis=0), values[plain].mean(axis=0), jnp.stack([*map(chosen, SETTINGS)], axis=1)
    )


def _tried(sampled: _Sampled, episodes: Int[np.ndarray, " s"]) -> list[Tried]:
    above = np.asarray(sampled.chosen - sampled.plain[:, None])
    return [
        Tried(
            setting,
            gain=float(gains[:, 0].mean()),
            cautious=float(gains[:, 1].mean()),
            error=_error(gains[:, 1], episodes),
            better=float((gains[:, 0] > 0).mean()),
        )
        for setting, gains in zip(SETTINGS, above.swapaxes(0, 1), strict=True)
    ]


def _divided(agent: ACRLPDAgent) -> tuple[Modules, CriticNetworks]:
    """Return the networks with the first half of the critics, which choose and guide, and all critics."""
    modules = agent.acting_modules()
    half = keep_critics(agent.acting_critic, np.arange(agent.config.critic.num_critics // 2))
    choosing = nnx.merge(agent.nets.critic_def, half)
    guide = None
    if modules.guide is not None:
        guide = Guide(choosing, modules.guide.q_scale, modules.guide.weights)
    return dataclasses.replace(modules, critic=choosing, guide=guide), modules.critic


def _judged(q: Float[Array, "e n b"]) -> tuple[Float[Array, "n b"], Float[Array, "n b"]]:
    """Return the mean of the second half of the critics, and that less a standard deviation of all."""
    judged = q[q.shape[0] // 2 :].mean(axis=0)
    return judged, judged - jnp.std(q, axis=0)


def _error(gains: Float[np.ndarray, " s"], episodes: Int[np.ndarray, " s"]) -> float:
    """Return the standard error of a mean, over episodes, whose states are alike; infinite for a single episode."""
    means = np.array([gains[episodes == number].mean() for number in np.unique(episodes)])
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("inf")


def _auc(recorded: _Recorded, values: Float[np.ndarray, " c"]) -> tuple[float | None, tuple[float, float] | None]:
    """Return how well an episode's mean value ranks successes above failures, with its interval."""
    numbers = np.arange(len(recorded.success))
    of_episode = [values[(recorded.episode == number) & ~np.isnan(values)] for number in numbers]
    known = np.array([len(each) > 0 for each in of_episode])
    score = np.array([each.mean() if len(each) else np.nan for each in of_episode])
    success = recorded.success > 0
    good, bad = score[known & success], score[known & ~success]
    area = agreement.auc(good, bad)
    return area, None if area is None else agreement.auc_interval(area, len(good), len(bad))


def _choose(tried: Sequence[Tried], interval: tuple[float, float] | None) -> tuple[Setting, str]:
    """Return the cheapest setting within a standard error of the best, or plain samples where nothing is known."""
    plain = Setting(1, 0.0)
    if interval is None:
        return plain, "plain samples: there is no success or no failure among the held-out episodes"
    if interval[0] <= 0.5:
        return plain, "plain samples: Q does not rank held-out successes above failures by more than chance"
    best = max(tried, key=lambda each: each.cautious)
    if not best.cautious > 2 * best.error:
        return plain, "plain samples: no setting gains more, by critics that did not choose, than chance brings"
    enough = next(each for each in tried if each.cautious >= best.cautious - best.error)
    return enough.setting, f"the smallest N within a standard error of the best ({best.setting})"
