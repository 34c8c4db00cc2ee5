"""ACRLPD: action-chunked reinforcement learning with prior data for a flow policy. This page has the whole algorithm.

Read it with ``docs/algorithm.md``: ``joint_loss`` follows its sections in order, and ``losses.py`` has the equations.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from acrlpd.agents import candidates, losses, td
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.draws import Draws
from acrlpd.agents.losses import LossWeights
from acrlpd.agents.state import AgentState
from acrlpd.models import flow
from acrlpd.models.parameters import Params
from acrlpd.types import ChunkBatch


def joint_loss(
    params: dict[str, Params], agent: AgentState, batch: ChunkBatch, draws: Draws, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the sum of critic, imitation, actor and temperature losses; s and s' take one prefix pass each."""
    config, nets = agent.config, agent.nets
    modules = nets.modules(params, agent.frozen)
    constant = agent.guided(nets.modules(jax.lax.stop_gradient(params), agent.frozen))
    temperature = jax.lax.stop_gradient(jnp.exp(params["temperature"]["log_temperature"]))

    prefix = flow.encode(modules.policy, batch.observations)
    next_prefix = flow.encode(constant.policy, batch.next_observations)

    # Section 2: the critic's loss at the chunk in the data.
    chosen = candidates.choose(constant, config.in_target, next_prefix, draws.candidates, config.steps_in_target)
    critic_loss, q, target = td.loss_and_values(modules.critic, agent, batch, draws, prefix, next_prefix, chosen.chunk)

    # Section 3: the policy's losses, from imitation and from the extraction.
    flow_loss = flow.flow_loss(modules.policy, prefix, batch.actions, draws.flow_noise, draws.flow_time)
    sample_weights = _bc_sample_weights(config, flow_loss, batch.valid, q, target)
    bc_loss = losses.bc_loss(flow_loss, batch.valid, sample_weights)
    climbing = dataclasses.replace(modules, critic=constant.critic)
    actor_loss, actor_metrics = config.make_extraction(config.flow_steps).actor_loss(
        climbing, prefix, draws.actor, temperature
    )

    # Section 4: the temperature's loss, from the spread of the candidates drawn above.
    robot_candidates = chosen.candidates[..., : nets.action_dim]
    entropy = losses.gaussian_entropy(robot_candidates)
    alpha_loss = jnp.zeros(())
    if config.temperature.adaptive:
        alpha_loss = losses.temperature_loss(
            params["temperature"]["log_temperature"], entropy, target_entropy=nets.target_entropy
        )

    total = (
        weights.critic_weight * critic_loss
        + weights.bc_weight * bc_loss
        + weights.actor_weight * actor_loss
        + weights.alpha_weight * alpha_loss
    )
    spread = jnp.sqrt(jnp.var(robot_candidates, axis=0, ddof=min(1, len(robot_candidates) - 1)).sum(axis=(1, 2)))
    metrics = {
        "total_loss": total,
        "critic_loss": critic_loss,
        "bc_loss": bc_loss,
        "actor_loss": actor_loss,
        "alpha_loss": alpha_loss,
        "alpha_value": temperature,
        "entropy_estimate": entropy.mean(),
        "best_of_n_variance": chosen.scores.var(axis=0).mean(),
        "action_diversity": jnp.sqrt(2.0) * spread.mean(),  # root mean square distance between two candidates
    }
    return total, metrics | td.metrics(q, target) | dict(actor_metrics)


def critic_alone_loss(
    params: Params, agent: AgentState, batch: ChunkBatch, draws: Draws
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return section 2's loss at the data's next chunk, not the policy's: it learns the value of the data's policy."""
    if batch.next_actions is None:
        raise ValueError("this batch has no next_actions: make it with ChunkLoader.batch(..., critic_alone=True)")
    modules = agent.nets.modules(agent.params | {"critic": params}, agent.frozen)
    prefix, next_prefix = (flow.encode(modules.policy, seen) for seen in (batch.observations, batch.next_observations))
    loss, q, target = td.loss_and_values(modules.critic, agent, batch, draws, prefix, next_prefix, batch.next_actions)
    return loss, {"total_loss": loss, "critic_loss": loss} | td.metrics(q, target)


def _bc_sample_weights(
    config: AgentConfig,
    flow_loss: Float[Array, "b h"],
    valid: Float[Array, "b h"],
    q: Float[Array, "e b"],
    target: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Return weights that favour chunks better than the critic expected (importance) or imitated badly (difficulty)."""
    if config.bc_weighting == "none":
        return jnp.ones(flow_loss.shape[:1])
    if config.bc_weighting == "importance":
        score = target - q.mean(axis=0)
    else:
        score = jnp.average(flow_loss, axis=1, weights=valid)  # padding is never imitated, so it is always difficult
    return losses.bounded_weights(score, temperature=config.bc_weighting_temperature, bound=config.bc_weighting_bound)
