"""The critic's loss (``docs/algorithm.md``, section 2), for any value of s': of a chunk there, or V's.

The equations are in ``losses.py``; this file computes their inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents import losses
from acrlpd.agents.draws import Draws
from acrlpd.agents.state import AgentState
from acrlpd.models.critic import CriticNetworks
from acrlpd.models.flow import Prefix
from acrlpd.types import ChunkBatch


def loss_and_values(
    critic: CriticNetworks,
    agent: AgentState,
    batch: ChunkBatch,
    draws: Draws,
    prefix: Prefix,
    next_value: Float[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, "e b"], Float[Array, " b"]]:
    """Return the TD loss, the members' values of the dataset's chunk, and their target, which uses ``next_value``."""
    config = agent.config
    target = target_values(agent, batch, next_value)
    features = jax.lax.stop_gradient(prefix.features)
    q = critic(features, prefix.state, batch.actions[None], dropout_rng=draws.dropout_rng)[:, 0]  # [e b]
    loss = losses.critic_loss(q, target, batch.sequence_mask, huber_delta=config.huber_delta)
    if config.critic.q_aggregation == "weighted":  # the aggregate's TD error trains its weights only
        aggregate = critic.aggregate(jax.lax.stop_gradient(q))[None]
        loss += losses.critic_loss(aggregate, target, batch.sequence_mask, huber_delta=config.huber_delta)
    return loss, q, target


def target_values(agent: AgentState, batch: ChunkBatch, next_value: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return the discounted rewards of the critics' horizon and ``next_value`` after it."""
    rewards, valid = (each[:, : agent.nets.critic_horizon] for each in (batch.rewards, batch.valid))
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
