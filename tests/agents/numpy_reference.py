"""One update of the agent in NumPy and float64, written from ``docs/algorithm.md`` and from nothing else.

Gradients are central differences of each group's own loss, with everything else held as a number: the table of
section 7 is what is differentiated here, not what automatic differentiation was stopped from doing.
The networks are the flow MLP and the critic ensemble (concatenated inputs, GELU, layer norm after it), without
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]  # by path, as "out/kernel"


@dataclasses.dataclass(frozen=True)
class Batch:
    """The fields of section 1 that a loss reads."""

    state: np.ndarray  # [b s]
    next_state: np.ndarray  # [b s]
    actions: np.ndarray  # [b h a]
    rewards: np.ndarray  # [b h]
    valid: np.ndarray  # [b h]
    bootstrap_mask: np.ndarray  # [b]
    sequence_mask: np.ndarray  # [b]


@dataclasses.dataclass(frozen=True)
class Draws:
    """All that is random in one update."""

    candidate_noise: np.ndarray  # [n b h a], at the next state
    pair: np.ndarray  # the two critics of "subset"
    flow_noise: np.ndarray  # [b h a]
    flow_time: np.ndarray  # [b]
    actor_noise: np.ndarray  # [m b h a]


@dataclasses.dataclass(frozen=True)
class Settings:
    extraction: str
    target: str
    statistic: str  # of an implicit target
    level: float
    aggregation: str
    judged: tuple[int, int]  # steps and action dimensions of a chunk that critics read: h and the robot's A
    backup: int  # steps that a TD target looks ahead; more than h: long critics learn from it, and the others from them
    distill_level: float
    pessimism: float
    discount: float
    tau: float
    num_steps: int
    action_clip: float | None
    huber_delta: float | None
    distill_weight: float
    bc_weighting: str
    bc_bound: float
    entropy_multiplier: float
    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_norm: float


@dataclasses.dataclass
class State:
    """Parameters by group, with AdamW's moments."""

    params: dict[str, Params]
    target_critic: Params
    first: dict[str, Params]
    second: dict[str, Params]
    count: int = 0


def initial_state(params: dict[str, Params], target_critic: Params) -> State:
    zeros = {group: {name: np.zeros_like(x) for name, x in tree.items()} for group, tree in params.items()}
    return State(params, target_critic, zeros, zeros)


# -- networks ----------------------------------------------------------------------------------------------------------


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def velocity(policy: Params, state: np.ndarray, x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """[b h a] at ``x`` [b h a] and ``time`` [b]."""
    inputs = np.concatenate([state, x.reshape(len(x), -1), time[:, None]], axis=1)
    kernel = np.concatenate([policy["state_in/kernel"], policy["chunk_time_in/kernel"]])
    hidden = gelu(inputs @ kernel + policy["state_in/bias"] + policy["chunk_time_in/bias"])
    return (hidden @ policy["out/kernel"] + policy["out/bias"]).reshape(x.shape)


def euler(policy: Params, state: np.ndarray, noise: np.ndarray, num_steps: int) -> np.ndarray:
    """Chunks [n b h a] from noise, candidate by candidate."""
    chunks = []
    for x in noise:
        for step in range(num_steps):
            time = np.full(len(x), 1 - step / num_steps)
            x = x - velocity(policy, state, x, time) / num_steps
        chunks.append(x)
    return np.stack(chunks)


def member_values(critic: Params, state: np.ndarray, chunk: np.ndarray, judged: tuple[int, int]) -> np.ndarray:
    """Q [e b] of one chunk for each state, member by member."""
    inputs = np.concatenate([state, chunk[:, : judged[0], : judged[1]].reshape(len(chunk), -1)], axis=1)
    kernel = np.concatenate([critic["observation_in/kernel"], critic["chunk_in/kernel"]], axis=1)
    return outputs(critic, inputs, kernel, critic["observation_in/bias"] + critic["chunk_in/bias"])


def state_value(value: Params, state: np.ndarray) -> np.ndarray:
    """V [b] of each state: a critic of one member that reads no chunk."""
    return outputs(value, state, value["observation_in/kernel"], value["observation_in/bias"])[0]


def outputs(critic: Params, inputs: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[e b] of an ensemble, whose first layer is given, member by member."""
    values = []
    for e in range(len(critic["out/bias"])):
        x = gelu(inputs @ kernel[e] + bias[e])
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
        x = x * critic["norms/0/scale"][e] + critic["norms/0/bias"][e]
        values.append((x @ critic["out/kernel"][e] + critic["out/bias"][e])[:, 0])
    return np.stack(values)


def aggregate(critic: Params, q: np.ndarray, settings: Settings, pair: np.ndarray | None = None) -> np.ndarray:
    """One value from the members, axis 0. ``pair``: the two of "subset"; its mean ranks candidates."""
    aggregation = settings.aggregation
    if aggregation == "mean_minus_std":
        mean = sum(q) / len(q)
        return mean - settings.pessimism * np.sqrt(sum((each - mean) ** 2 for each in q) / len(q))
    if aggregation == "min":
        return q.min(axis=0)
    if aggregation == "weighted":
        weights = np.exp(critic["aggregation_logits"])
        return np.tensordot(weights / weights.sum(), q, axes=1)
    if aggregation == "subset" and pair is not None:
        return np.minimum(q[pair[0]], q[pair[1]])
    return q.mean(axis=0)


# -- losses ------------------------------------------------------------------------------------------------------------


def clip(chunks: np.ndarray, limit: float | None) -> np.ndarray:
    return chunks if limit is None else np.clip(chunks, -limit, limit)


def propose(state: State, settings: Settings, observation: np.ndarray, noise: np.ndarray) -> np.ndarray:
    if settings.extraction == "distill":
        student = {**state.params["policy"], **state.params["student"]}
        return clip(euler(student, observation, noise, 1), settings.action_clip)
    return clip(euler(state.params["policy"], observation, noise, settings.num_steps), settings.action_clip)


def td_target(state: State, settings: Settings, batch: Batch, draws: Draws, candidates: np.ndarray) -> np.ndarray:
    critic, judged = state.params["critic"], settings.judged
    scores = np.stack(
        [aggregate(critic, member_values(critic, batch.next_state, x, judged), settings) for x in candidates]
    )
    chosen = np.stack([candidates[scores[:, i].argmax(), i] for i in range(len(batch.state))])
    return returns_and(slow_value(state, settings, batch.next_state, chosen, draws), settings, batch)


def slow_value(
    state: State, settings: Settings, observation: np.ndarray, chunk: np.ndarray, draws: Draws
) -> np.ndarray:
    """[b] of the target critics."""
    members = member_values(state.target_critic, observation, chunk, settings.judged)
    return aggregate(state.target_critic, members, settings, draws.pair)


def returns_and(next_value: np.ndarray, settings: Settings, batch: Batch) -> np.ndarray:
    """y of section 2, from the value [b] of the next state."""
    horizon = settings.backup
    target = settings.discount**horizon * batch.bootstrap_mask * next_value
    for k in range(horizon):
        target = target + settings.discount**k * batch.valid[:, k] * batch.rewards[:, k]
    return target


def target_of_steps(
    rewards: np.ndarray,
    terminals: np.ndarray,
    has_final: bool,
    start: int,
    horizon: int,
    discount: float,
    value: Callable[[int], float],
) -> float | None:
    """The target of the steps of an episode from ``start`` on, one after the other, from section 1 and 2's words.

    ``value(t)`` is that of the state after t steps of the episode. None: the data does not say what follows.
    """
    total = 0.0
    for k in range(horizon):
        if start + k == len(rewards):  # a time limit: what would have followed is unknown
            return None
        total += discount**k * rewards[start + k]
        if terminals[start + k]:
            return total
    if start + horizon == len(rewards) and not has_final:
        return None
    return total + discount**horizon * value(start + horizon)


def penalty(error: np.ndarray, huber_delta: float | None) -> np.ndarray:
    """Twice Huber's loss, so that it is the square near zero."""
    if huber_delta is None:
        return error**2
    size = np.abs(error)
    return np.where(size <= huber_delta, error**2, 2 * huber_delta * size - huber_delta**2)


def distilled_loss(critic: Params, settings: Settings, batch: Batch, target: np.ndarray) -> float:
    """Member by member, the expectile loss towards the long critics' value."""
    q = member_values(critic, batch.state, batch.actions, settings.judged)
    level, mask = settings.distill_level, batch.sequence_mask
    return np.mean([implicit_loss(member, target, mask, "expectile", level) for member in q])


def critic_loss(critic: Params, settings: Settings, batch: Batch, target: np.ndarray, held: np.ndarray) -> float:
    """TD error of every member. Under "weighted", also the aggregate's own, of the ``held`` members [e b]."""
    q = member_values(critic, batch.state, batch.actions, settings.judged)
    loss = np.mean(batch.sequence_mask * penalty(q - target, settings.huber_delta))
    if settings.aggregation == "weighted":
        error = aggregate(critic, held, settings) - target
        loss = loss + np.mean(batch.sequence_mask * penalty(error, settings.huber_delta))
    return loss


def implicit_loss(v: np.ndarray, q: np.ndarray, mask: np.ndarray, statistic: str, level: float) -> float:
    """Row by row: how far Q is from V, weighted by the side on which it lies."""
    total = 0.0
    for value, target, counts in zip(v, q, mask, strict=True):
        size = abs(target - value) ** {"expectile": 2, "quantile": 1}[statistic]
        total += counts * size * (level if target >= value else 1 - level)
    return total / len(v)


def flow_loss(policy: Params, batch: Batch, draws: Draws) -> np.ndarray:
    """[b h]"""
    t = draws.flow_time[:, None, None]
    x = t * draws.flow_noise + (1 - t) * batch.actions
    error = velocity(policy, batch.state, x, draws.flow_time) - (draws.flow_noise - batch.actions)
    return np.mean(error**2, axis=2)


def bounded_weights(score: np.ndarray, bound: float) -> np.ndarray:
    weights = np.exp((score - score.mean()) / (score.std() + 1e-6))
    weights = np.clip(weights, bound**-0.5, bound**0.5)
    return weights / weights.mean()


def sample_weights(state: State, settings: Settings, batch: Batch, draws: Draws, target: np.ndarray) -> np.ndarray:
    if settings.bc_weighting == "importance":
        q = member_values(state.params["critic"], batch.state, batch.actions, settings.judged)
        return bounded_weights(target - q.mean(axis=0), settings.bc_bound)
    if settings.bc_weighting == "difficulty":
        loss = batch.valid * flow_loss(state.params["policy"], batch, draws)
        return bounded_weights(loss.sum(axis=1) / batch.valid.sum(axis=1), settings.bc_bound)
    return np.ones(len(batch.state))


def entropy(chunks: np.ndarray, judged: tuple[int, int]) -> float:
    """Of the diagonal Gaussian with the chunks' variance over axis 0; nats, mean over the batch."""
    variance = chunks[..., : judged[0], : judged[1]].var(axis=0) + 1e-6
    return 0.5 * np.log(2 * np.pi * np.e * variance).sum(axis=(1, 2)).mean()


def q_gradient_loss(
    policy: Params, state: State, settings: Settings, batch: Batch, draws: Draws, size: float | None
) -> float:
    """``size``: the constant that Q is divided by; None: its own mean size, as where a loss value is wanted."""
    chunks = clip(euler(policy, batch.state, draws.actor_noise, settings.num_steps), settings.action_clip)
    critic = state.params["critic"]
    q = np.stack([aggregate(critic, member_values(critic, batch.state, x, settings.judged), settings) for x in chunks])
    size = np.abs(q).mean() if size is None else size
    alpha = np.exp(state.params["temperature"]["log_temperature"])
    return -q.mean() / (size + 1e-6) - alpha * entropy(chunks, settings.judged)


def q_size(state: State, settings: Settings, batch: Batch, draws: Draws) -> float:
    chunks = clip(
        euler(state.params["policy"], batch.state, draws.actor_noise, settings.num_steps), settings.action_clip
    )
    critic = state.params["critic"]
    q = [aggregate(critic, member_values(critic, batch.state, x, settings.judged), settings) for x in chunks]
    return np.abs(q).mean()


def distill_loss(student: Params, state: State, settings: Settings, batch: Batch, draws: Draws) -> float:
    policy = state.params["policy"]
    teacher = clip(euler(policy, batch.state, draws.actor_noise, settings.num_steps)[0], settings.action_clip)
    chunk = euler({**policy, **student}, batch.state, draws.actor_noise, 1)[0]
    q = member_values(state.params["critic"], batch.state, clip(chunk, settings.action_clip), settings.judged)
    return settings.distill_weight * np.mean((chunk - teacher) ** 2) - q.mean()


# -- the update --------------------------------------------------------------------------------------------------------


def gradient(loss: Callable[[Params], float], params: Params, step: float = 1e-5) -> Params:
    """Central differences, one entry at a time."""
    grads = {}
    for name, value in params.items():
        grads[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            above, below = np.array(value), np.array(value)
            above[index] += step
            below[index] -= step
            rise = loss({**params, name: above}) - loss({**params, name: below})
            grads[name][index] = rise / (2 * step)
    return grads


def adamw(state: State, group: str, grads: Params, settings: Settings, count: int) -> tuple[Params, Params, Params]:
    """New parameters and moments: clipping by the global norm, then Adam with decoupled decay."""
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    params, first, second = {}, {}, {}
    for name, value in state.params[group].items():
        g = grads[name] * min(1.0, settings.max_norm / max(norm, 1e-300))
        first[name] = settings.b1 * state.first[group][name] + (1 - settings.b1) * g
        second[name] = settings.b2 * state.second[group][name] + (1 - settings.b2) * g**2
        mean, square = first[name] / (1 - settings.b1**count), second[name] / (1 - settings.b2**count)
        step = mean / (np.sqrt(square) + settings.eps) + settings.weight_decay * value
        params[name] = value - settings.learning_rate * step
    return params, first, second


def update(
    state: State, batch: Batch, draws: Draws, settings: Settings, weights: dict[str, float]
) -> tuple[State, dict[str, float]]:
    """The state after one update, and the losses before it. ``weights``: critic, bc, actor, alpha."""
    old = state.params
    if settings.target == "implicit":
        target = returns_and(state_value(old["value"], batch.next_state), settings, batch)
        data_q = slow_value(state, settings, batch.state, batch.actions, draws)
    else:
        candidates = propose(state, settings, batch.next_state, draws.candidate_noise)
        target = td_target(state, settings, batch, draws, candidates)
        target_entropy = -settings.entropy_multiplier * np.prod(settings.judged)
        excess = entropy(candidates, settings.judged) - target_entropy
    held = member_values(old["critic"], batch.state, batch.actions, settings.judged)
    has_long = settings.backup > settings.judged[0]
    if has_long:
        long = dataclasses.replace(settings, judged=(settings.backup, settings.judged[1]))
        long_q = member_values(old["long_critic"], batch.state, batch.actions, long.judged)
        td_of_long, target = target, aggregate(old["long_critic"], long_q, settings, draws.pair)
    sample_weight = sample_weights(state, settings, batch, draws, target)

    def long_term(critic: Params) -> float:
        return critic_loss(critic, long, batch, td_of_long, long_q)

    def critic_term(critic: Params) -> float:
        if has_long:
            return distilled_loss(critic, settings, batch, target)
        return critic_loss(critic, settings, batch, target, held)

    def bc_term(policy: Params) -> float:
        return np.mean(sample_weight[:, None] * batch.valid * flow_loss(policy, batch, draws))

    def value_term(value: Params) -> float:
        v = state_value(value, batch.state)
        return implicit_loss(v, data_q, batch.sequence_mask, settings.statistic, settings.level)

    def alpha_term(temperature: Params) -> float:
        return np.exp(temperature["log_temperature"]) * excess

    losses = {
        "critic_loss": critic_term(old["critic"]) + (long_term(old["long_critic"]) if has_long else 0.0),
        "bc_loss": bc_term(old["policy"]),
        "actor_loss": 0.0,
        "target_q_mean": target.mean(),
    }
    terms = {
        "critic": lambda critic: weights["critic"] * critic_term(critic),
        "policy": lambda policy: weights["bc"] * bc_term(policy),
    }
    if has_long:
        terms["long_critic"] = lambda critic: weights["critic"] * long_term(critic)
    if settings.target == "implicit":  # nothing is drawn whose entropy could move the temperature
        v = state_value(old["value"], batch.state)
        losses |= {"value_loss": value_term(old["value"]), "alpha_loss": 0.0, "v_mean": v.mean()}
        losses |= {"advantage_mean": (data_q - v).mean(), "advantage_positive": (data_q > v).mean()}
        terms["value"] = lambda value: weights["critic"] * value_term(value)
    else:
        losses |= {"alpha_loss": alpha_term(old["temperature"]), "entropy_estimate": excess + target_entropy}
        terms["temperature"] = lambda temperature: weights["alpha"] * alpha_term(temperature)
    if settings.extraction == "q_gradient":
        size = q_size(state, settings, batch, draws)
        losses["actor_loss"] = q_gradient_loss(old["policy"], state, settings, batch, draws, None)
        terms["policy"] = lambda policy: (
            weights["bc"] * bc_term(policy)
            + weights["actor"] * q_gradient_loss(policy, state, settings, batch, draws, size)
        )
    if settings.extraction == "distill":
        losses["actor_loss"] = distill_loss(old["student"], state, settings, batch, draws)
        terms["student"] = lambda student: weights["actor"] * distill_loss(student, state, settings, batch, draws)

    params, first, second = dict(old), {}, {}
    for group, term in terms.items():
        grads = gradient(term, old[group])
        params[group], first[group], second[group] = adamw(state, group, grads, settings, state.count + 1)
    target_critic = {
        name: settings.tau * params["critic"][name] + (1 - settings.tau) * slow
        for name, slow in state.target_critic.items()
    }
    return State(params, target_critic, first, second, state.count + 1), losses
