"""RLPD on action chunks: soft actor-critic with prior data (baseline RLPD-AC of Li et al. 2025, arXiv:2507.07969).

The policy is a tanh-squashed Gaussian over whole chunks (``models.gaussian``) instead of a flow. ``bc_weight`` 0 is
RLPD-AC, 0.01 is QC-RLPD. As in Q-chunking's code, the target has no entropy bonus, and acting draws a sample.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from acrlpd.agents import losses, td
from acrlpd.agents.draws import Draws
from acrlpd.agents.losses import LossWeights
from acrlpd.agents.state import AgentState
from acrlpd.models.gaussian import ChunkGaussian
from acrlpd.types import ChunkBatch


def joint_loss(
    params: dict[str, Any], agent: AgentState, batch: ChunkBatch, draws: Draws, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss and metrics: the critic's at the dataset's chunk, actor's and temperature's at the policy's."""
    config, nets = agent.config, agent.nets
    modules = nets.modules(params, agent.frozen)
    constant = nets.modules(jax.lax.stop_gradient(params), agent.frozen)
    policy, next_policy = cast(ChunkGaussian, modules.policy), cast(ChunkGaussian, constant.policy)
    log_temperature = params["temperature"]["log_temperature"]
    prefix = policy.encode(batch.observations)
    next_prefix = next_policy.encode(batch.next_observations)

    next_chunk, _ = next_policy.sample(next_prefix, draws.candidates[:1])
    next_value = td.slow_value(agent, next_prefix, next_chunk[0], draws.pair_rng)
    critic_loss, q, target = td.loss_and_values(modules, agent, batch, draws, prefix, next_value)

    chunks, log_prob = policy.sample(prefix, draws.actor[:1], steps=nets.critic_horizon)
    actor_q = constant.critic(prefix.features, prefix.state, chunks)  # [e 1 b]
    actor_loss = losses.soft_actor_loss(log_prob[0], actor_q[:, 0], jnp.exp(jax.lax.stop_gradient(log_temperature)))
    bc_loss = -jnp.mean(policy.log_prob(prefix, batch.actions))

    alpha_loss = jnp.zeros(())
    if config.temperature.adaptive:
        alpha_loss = losses.temperature_loss(log_temperature, -log_prob[0], target_entropy=nets.target_entropy)
    total = (
        weights.critic_weight * critic_loss
        + weights.bc_weight * bc_loss
        + weights.actor_weight * actor_loss
        + weights.alpha_weight * alpha_loss
    )
    return total, td.metrics(q, target) | {
        "total_loss": total,
        "critic_loss": critic_loss,
        "bc_loss": bc_loss,
        "actor_loss": actor_loss,
        "alpha_loss": alpha_loss,
        "alpha_value": jnp.exp(log_temperature),
        "entropy_estimate": -log_prob.mean(),
        "actor_q_mean": actor_q.mean(),
    }
