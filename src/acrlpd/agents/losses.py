"""The equations of ``docs/algorithm.md``, each once, as pure functions: arrays in, arrays out."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from acrlpd import fields
from acrlpd.fields import NonNegativeFloat
from acrlpd.types import typed

ImplicitStatistic = Literal["expectile", "quantile"]


@struct.dataclass
class LossWeights:
    """The weight of each term of the joint loss. It is an argument of the update, so a schedule never recompiles."""

    critic_weight: NonNegativeFloat = 1.0  # TD error
    actor_weight: NonNegativeFloat = 1.0  # Q of the policy's own chunks
    bc_weight: NonNegativeFloat = 1.0  # imitation
    alpha_weight: NonNegativeFloat = 1.0  # temperature

    def __post_init__(self):
        plain = (bool, int, float, str)  # a traced value cannot be checked
        fields.check(self, without=tuple(name for name, value in vars(self).items() if not isinstance(value, plain)))


@typed
def td_target(
    rewards: Float[Array, "b h"],
    valid: Float[Array, "b h"],
    bootstrap_mask: Float[Array, " b"],
    next_q: Float[Array, " b"],
    *,
    discount: float,
) -> Float[Array, " b"]:
    """Return the discounted reward of the chunk plus the value after it (Li et al. 2025, arXiv:2507.07969, eq. 5).

    Here h is the critic's horizon: the steps that it judges, after which ``next_q`` is taken.
    """
    horizon = rewards.shape[1]
    powers = discount ** jnp.arange(horizon, dtype=rewards.dtype)
    returns = jnp.sum(valid * rewards * powers[None, :], axis=1)
    return returns + discount**horizon * bootstrap_mask * next_q


@typed
def critic_loss(
    q: Float[Array, "e b"],
    target: Float[Array, " b"],
    sequence_mask: Float[Array, " b"],
    *,
    huber_delta: float | None = None,
) -> Float[Array, ""]:
    """Return the penalty on the TD error, averaged over members and the whole batch; masked chunks count as zero."""
    return jnp.mean(sequence_mask[None, :] * _penalty(q - target[None, :], huber_delta))


@typed
def implicit_value_loss(
    v: Float[Array, " b"],
    q: Float[Array, " b"],
    sequence_mask: Float[Array, " b"],
    *,
    statistic: ImplicitStatistic,
    level: float,
) -> Float[Array, ""]:
    """Return the loss of V(s) at an expectile (IQL, arXiv:2110.06169, eq. 5) or quantile of Q over the data's chunks.

    An error u = Q - V weighs ``level`` above V and 1 - ``level`` below it; it is squared for the expectile and absolute
    for the quantile. Mean over the whole batch; masked chunks count as zero.
    """
    u = q - v
    size = jnp.square(u) if statistic == "expectile" else jnp.abs(u)
    return jnp.mean(sequence_mask * jnp.abs(level - (u < 0)) * size)


@typed
def distilled_critic_loss(
    q: Float[Array, "e b"], target: Float[Array, " b"], sequence_mask: Float[Array, " b"], *, level: float
) -> Float[Array, ""]:
    """Return the expectile loss of short critics towards a long one's value (DQC, arXiv:2512.10926).

    With a high ``level`` the short critic is optimistic about the rest of the long chunk: what the data did there can
    only be worse than the best. Mean over members and the whole batch; masked chunks count as zero.
    """
    of_member = functools.partial(implicit_value_loss, statistic="expectile", level=level)
    return jnp.mean(jax.vmap(of_member, in_axes=(0, None, None))(q, target, sequence_mask))


def _penalty(error: Float[Array, "..."], huber_delta: float | None) -> Float[Array, "..."]:
    """Return the squared or the Huber loss, scaled so that both are error**2 near zero."""
    if huber_delta is None:
        return jnp.square(error)
    size = jnp.minimum(jnp.abs(error), huber_delta)
    return size * (2 * jnp.abs(error) - size)


@typed
def bc_loss(
    flow_loss: Float[Array, "b h"], valid: Float[Array, "b h"], sample_weights: Float[Array, " b"]
) -> Float[Array, ""]:
    """Return pi0's flow loss on the dataset's chunk, real steps only; mean over batch and horizon."""
    return jnp.mean(sample_weights[:, None] * valid * flow_loss)


@typed
def bounded_weights(score: Float[Array, " b"], *, temperature: float, bound: float) -> Float[Array, " b"]:
    """Return sample weights that grow with a score, within a factor ``bound`` of each other, with mean 1.

    The standardized score goes through exp, is clipped to [1/sqrt(bound), sqrt(bound)] and divided by its mean.
    """
    standardized = (score - score.mean()) / (score.std() + 1e-6)
    limit = 0.5 * jnp.log(bound)
    weights = jnp.exp(jnp.clip(standardized / temperature, -limit, limit))
    return jax.lax.stop_gradient(weights / weights.mean())


@typed
def q_gradient_loss(q: Float[Array, "m b"]) -> Float[Array, ""]:
    """Return -Q of the policy's own chunks over mean |Q|, so that ``actor_weight`` needs no retuning (TD3+BC)."""
    return -jnp.mean(q) / (jax.lax.stop_gradient(jnp.mean(jnp.abs(q))) + 1e-6)


@typed
def distill_loss(student: Float[Array, "b h a"], teacher: Float[Array, "b h a"]) -> Float[Array, ""]:
    """Return the mean squared error between the one-step student and the full flow, from one noise (FQL, QC-FQL)."""
    return jnp.mean(jnp.square(student - jax.lax.stop_gradient(teacher)))


@typed
def gaussian_entropy(candidates: Float[Array, "n b h a"]) -> Float[Array, " b"]:
    """Return the entropy (nats, summed over h and a) of the diagonal Gaussian with the candidates' variance.

    A single candidate has no variance: pass at least two.
    """
    variance = jnp.var(candidates, axis=0)  # [b h a]
    return 0.5 * jnp.sum(jnp.log(2 * jnp.pi * jnp.e * (variance + 1e-6)), axis=(1, 2))


@typed
def temperature_loss(
    log_temperature: Float[Array, ""], entropy: Float[Array, " b"], *, target_entropy: float
) -> Float[Array, ""]:
    """Return alpha * (entropy - target): alpha falls while the policy's entropy is above the target (SAC)."""
    return jnp.exp(log_temperature) * jax.lax.stop_gradient(jnp.mean(entropy) - target_entropy)


@typed
def soft_actor_loss(
    log_prob: Float[Array, " b"], q: Float[Array, "e b"], temperature: Float[Array, ""]
) -> Float[Array, ""]:
    """Return alpha * log pi - Q of the policy's own chunk, where Q is the members' mean (SAC as in RLPD)."""
    return jnp.mean(temperature * log_prob - q.mean(axis=0))


Q_SCALE_WINDOW = 100  # updates


def q_scale(mean: Float[Array, ""], q: Float[Array, ""], step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the running mean of |Q| after an update whose batch has the mean |Q| ``q``; 0 stands for no mean yet.

    It is the mean of all updates until there are ``Q_SCALE_WINDOW``, and then forgets older ones exponentially.
    """
    share = jnp.maximum(1 / (step + 1.0), 1 / Q_SCALE_WINDOW)
    return jnp.where(mean > 0, mean + share * (q - mean), q)


def averaging_share(step: Int[Array, ""], *, decay: float) -> Float[Array, ""]:
    """Return the share of the newest parameters in their moving average: 1 - ``decay``, but 6 / (step + 6) at first.

    The average thus forgets its start: two thirds of its weight is on the last sixth of the updates, until it spans
    1 / (1 - decay) of them (polynomial-decay averaging, Shamir and Zhang 2013, arXiv:1212.1824).
    """
    return jnp.maximum(1 - decay, 6 / (step + 6))
