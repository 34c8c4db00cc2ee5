"""The critic's loss (``docs/algorithm.md``, section 2), for a next chunk from the agent, a baseline or the data.

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
    next_prefix: Prefix,
    next_chunk: Float[Array, "b h a"],
) -> tuple[Float[Array, ""], Float[Array, "e b"], Float[Array, " b"]]:
    """Return the TD loss, the members' values of the dataset's chunk, and their target, which uses ``next_chunk``."""
    config = agent.config
    target = target_values(agent, batch, next_prefix, next_chunk, draws.pair_rng)
    features = jax.lax.stop_gradient(prefix.features)
    q = critic(features, prefix.state, batch.actions[None], dropout_rng=draws.dropout_rng)[:, 0]  # [e b]
    loss = losses.critic_loss(q, target, batch.sequence_mask, huber_delta=config.huber_delta)
    if config.critic.q_aggregation == "weighted":  # the aggregate's TD error trains its weights only
        aggregate = critic.aggregate(jax.lax.stop_gradient(q))[None]
        loss += losses.critic_loss(aggregate, target, batch.sequence_mask, huber_delta=config.huber_delta)
    return loss, q, target


def target_values(
    agent: AgentState,
    batch: ChunkBatch,
    next_prefix: Prefix,
    next_chunk: Float[Array, "b h a"],
    pair_rng: PRNGKeyArray,
) -> Float[Array, " b"]:
    critic = nnx.merge(agent.nets.critic_def, agent.target_critic)
    members = critic(next_prefix.features, next_prefix.state, next_chunk[None])[:, 0]  # [e b]
    next_q = critic.aggregate(members, pair_rng)
    return losses.td_target(batch.rewards, batch.valid, batch.bootstrap_mask, next_q, discount=agent.config.discount)


def metrics(q: Float[Array, "e b"], target: Float[Array, " b"]) -> dict[str, Array]:
    return {
        "q_mean": q.mean(),
        "q_std": q.std(),
        "q_abs_mean": jnp.abs(q).mean(),
        "q_ensemble_variance": q.var(axis=0).mean(),
        "target_q_mean": target.mean(),
        "td_error_mean": jnp.abs(q - target[None]).mean(),
    }
