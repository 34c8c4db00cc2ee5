"""The baseline that only imitates, with the flow loss alone. No critic is trained, and acting does not use one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from acrlpd.agents import losses
from acrlpd.agents.draws import Draws
from acrlpd.agents.losses import LossWeights
from acrlpd.agents.state import AgentState
from acrlpd.models import flow
from acrlpd.types import ChunkBatch


def joint_loss(
    params: dict[str, Any], agent: AgentState, batch: ChunkBatch, draws: Draws, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the flow loss and metrics. It takes one prefix pass at s and one velocity."""
    policy = agent.nets.modules(params, agent.frozen).policy
    prefix = flow.encode(policy, batch.observations)
    flow_loss = flow.flow_loss(policy, prefix, batch.actions, draws.flow_noise, draws.flow_time)
    bc_loss = losses.bc_loss(flow_loss, batch.valid, jnp.ones(flow_loss.shape[:1]))
    total = weights.bc_weight * bc_loss
    return total, {"total_loss": total, "bc_loss": bc_loss}
