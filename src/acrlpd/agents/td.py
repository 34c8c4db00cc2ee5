"""The critic's loss (``docs/algorithm.md``, section 2), for any value of s': of a chunk there, or V's.

The equations are in ``losses.py``; this file computes their inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents import losses
from acrlpd.agents.draws import Draws
from acrlpd.agents.extraction import Modules
from acrlpd.agents.state import AgentState
from acrlpd.models.critic import CriticNetworks
from acrlpd.models.flow import Prefix
from acrlpd.types import ChunkBatch


def loss_and_values(
    modules: Modules,
    agent: AgentState,
    batch: ChunkBatch,
    draws: Draws,
    prefix: Prefix,
    next_value: Float[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, "e b"], Float[Array, " b"]]:
    """Return the critics' loss, the members' values of the dataset's chunk, and what they are fitted to.

    That is the TD target, which uses ``next_value``; or, if there are long critics, which learn from it, their values.
    """
    config = agent.config
    features = jax.lax.stop_gradient(prefix.features)

    def values(critic: CriticNetworks) -> Float[Array, "e b"]:
        return critic(features, prefix.state, batch.actions[None], dropout_rng=draws.dropout_rng)[:, 0]

    def fitted(critic: CriticNetworks, q: Float[Array, "e b"], target: Float[Array, " b"], loss: Any) -> Array:
        """Return the members' loss and, under ``weighted``, that of their aggregate, which trains its weights alone."""
        total = loss(q, target, batch.sequence_mask)
        if config.critic.q_aggregation == "weighted":
            total += loss(critic.aggregate(jax.lax.stop_gradient(q))[None], target, batch.sequence_mask)
        return total

    td_loss = functools.partial(losses.critic_loss, huber_delta=config.huber_delta)
    td_target, q = target_values(agent, batch, next_value), values(modules.critic)
    if modules.long_critic is None:
        return fitted(modules.critic, q, td_target, td_loss), q, td_target
    long_q = values(modules.long_critic)
    long_value = jax.lax.stop_gradient(modules.long_critic.aggregate(long_q, draws.pair_rng))
    distill = functools.partial(losses.distilled_critic_loss, level=config.critic.distill_level)
    loss = fitted(modules.long_critic, long_q, td_target, td_loss) + fitted(modules.critic, q, long_value, distill)
    return loss, q, long_value


def target_values(agent: AgentState, batch: ChunkBatch, next_value: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return the discounted rewards of the steps that a target looks ahead, and ``next_value`` after them."""
    rewards, valid = (each[:, : agent.nets.backup_horizon] for each in (batch.rewards, batch.valid))
    return losses.td_target(rewards, valid, batch.bootstrap_mask, next_value, discount=agent.config.discount)


def slow_value(
    agent: AgentState, prefix: Prefix, chunk: Float[Array, "b h a"], pair_rng: PRNGKeyArray
) -> Float[Array, " b"]:
    """Return Qbar: the aggregate of the target critics at one chunk per observation."""
    critic = nnx.merge(agent.nets.critic_def, agent.target_critic)
    members = critic(prefix.features, prefix.state, chunk[None])[:, 0]  # [e b]
    return critic.aggregate(members, pair_rng)


def metrics(q: Float[Array, "e b"], target: Float[Array, " b"]) -> dict[str, Array]:
    return {
        "q_mean": q.mean(),
        "q_std": q.std(),
        "q_abs_mean": jnp.abs(q).mean(),
        "q_ensemble_variance": q.var(axis=0).mean(),
        "target_q_mean": target.mean(),
        "td_error_mean": jnp.abs(q - target[None]).mean(),
    }
