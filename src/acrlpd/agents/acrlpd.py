"""ACRLPD: action-chunked reinforcement learning with prior data for a flow policy. This page has the whole algorithm.

Read it with ``docs/algorithm.md``: ``joint_loss`` follows its sections in order, and ``losses.py`` has the equations.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from acrlpd.agents import candidates, implicit, losses, td
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.draws import Draws
from acrlpd.agents.extraction import Modules
from acrlpd.agents.losses import LossWeights
from acrlpd.agents.state import AgentState
from acrlpd.models import flow
from acrlpd.models.flow import Prefix
from acrlpd.models.parameters import Params
from acrlpd.types import ChunkBatch


def joint_loss(
    params: dict[str, Params], agent: AgentState, batch: ChunkBatch, draws: Draws, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the weighted sum of the critic, value, imitation, actor and temperature losses, and metrics.

    s and s' are each encoded once.
    """
    config, nets = agent.config, agent.nets
    modules = nets.modules(params, agent.frozen)
    constant = agent.guided(nets.modules(jax.lax.stop_gradient(params), agent.frozen))
    temperature = jax.lax.stop_gradient(jnp.exp(params["temperature"]["log_temperature"]))

    prefix = flow.encode(modules.policy, batch.observations)
    next_prefix = flow.encode(constant.policy, batch.next_observations)

    # Section 2: the critic's loss at the chunk in the data. s' is valued by its best candidate, or by V.
    value_loss = jnp.zeros(())
    entropy: Float[Array, " b"] | None = None
    if modules.value is None:
        next_chunk, entropy, target_metrics = _best_of_n(constant, agent, draws, next_prefix)
        next_value = td.slow_value(agent, next_prefix, next_chunk, draws.pair_rng)
    else:
        next_value, value_loss, target_metrics = implicit.next_value_and_loss(
            modules.value, agent, batch, draws, prefix, next_prefix
        )
    critic_loss, q, target = td.loss_and_values(modules, agent, batch, draws, prefix, next_value)

    # Section 3: the policy's losses, from imitation and from the extraction.
    flow_loss = flow.flow_loss(modules.policy, prefix, batch.actions, draws.flow_noise, draws.flow_time)
    sample_weights = _bc_sample_weights(config, flow_loss, batch.valid, q, target)
    bc_loss = losses.bc_loss(flow_loss, batch.valid, sample_weights)
    climbing = dataclasses.replace(modules, critic=constant.critic)
    actor_loss, actor_metrics = config.make_extraction(config.flow_steps).actor_loss(
        climbing, prefix, draws.actor, temperature
    )

    # Section 4: the temperature's loss, from the entropy of the candidates drawn above.
    alpha_loss = jnp.zeros(())
    if config.temperature.adaptive:
        assert entropy is not None, "AgentConfig refuses an adaptive temperature where no candidates are drawn"
        alpha_loss = losses.temperature_loss(
            params["temperature"]["log_temperature"], entropy, target_entropy=nets.target_entropy
        )

    total = (
        weights.critic_weight * (critic_loss + value_loss)
        + weights.bc_weight * bc_loss
        + weights.actor_weight * actor_loss
        + weights.alpha_weight * alpha_loss
    )
    metrics = {
        "total_loss": total,
        "critic_loss": critic_loss,
        "bc_loss": bc_loss,
        "actor_loss": actor_loss,
        "alpha_loss": alpha_loss,
        "alpha_value": temperature,
    }
    return total, metrics | target_metrics | td.metrics(q, target) | dict(actor_metrics)


def _best_of_n(
    modules: Modules, agent: AgentState, draws: Draws, prefix: Prefix
) -> tuple[Float[Array, "b h a"], Float[Array, " b"], dict[str, Array]]:
    """Return the best of N candidates, the entropy of all of them, and metrics of their spread."""
    config = agent.config.in_target
    chosen = candidates.choose(modules, config, prefix, draws.candidates, config.steps_in_target)
    judged = modules.critic.judged(chosen.candidates)
    entropy = losses.gaussian_entropy(judged)
    spread = jnp.sqrt(jnp.var(judged, axis=0, ddof=min(1, len(judged) - 1)).sum(axis=(1, 2)))
    metrics = {
        "entropy_estimate": entropy.mean(),
        "best_of_n_variance": chosen.scores.var(axis=0).mean(),
        "action_diversity": jnp.sqrt(2.0) * spread.mean(),  # root mean square distance between two candidates
    }
    return chosen.chunk, entropy, metrics


def critic_alone_loss(
    params: dict[str, Params], agent: AgentState, batch: ChunkBatch, draws: Draws
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return section 2's losses without the policy's samples; ``params`` has the groups that train, critic and V.

    With V, nothing else changes. Without it, the next chunk is the data's: this learns the value of the data's policy.
    """
    modules = agent.nets.modules(agent.params | params, agent.frozen)
    prefix, next_prefix = (flow.encode(modules.policy, seen) for seen in (batch.observations, batch.next_observations))
    value_loss = jnp.zeros(())
    value_metrics: dict[str, Array] = {}
    if modules.value is not None:
        next_value, value_loss, value_metrics = implicit.next_value_and_loss(
            modules.value, agent, batch, draws, prefix, next_prefix
        )
    elif batch.next_actions is not None:
        next_value = td.slow_value(agent, next_prefix, batch.next_actions, draws.pair_rng)
    else:
        raise ValueError("this batch has no next_actions: make it with ChunkLoader.batch(..., critic_alone=True)")
    loss, q, target = td.loss_and_values(modules, agent, batch, draws, prefix, next_value)
    total = loss + value_loss
    return total, {"total_loss": total, "critic_loss": loss} | value_metrics | td.metrics(q, target)


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
