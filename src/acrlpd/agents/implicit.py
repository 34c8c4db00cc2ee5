"""The implicit TD target: V(s), a high expectile or quantile of Q over the data's own chunks (IQL, arXiv:2110.06169).

Nothing is sampled at s', and only the pooled features are read there. Such a V does not know actions that the data does
not have; candidates of the policy do (``docs/algorithm.md``, section 2).
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from acrlpd.agents import losses, td
from acrlpd.agents.draws import Draws
from acrlpd.agents.state import AgentState
from acrlpd.models.critic import ValueNetwork
from acrlpd.models.flow import Prefix
from acrlpd.types import ChunkBatch


def next_value_and_loss(
    value: ValueNetwork, agent: AgentState, batch: ChunkBatch, draws: Draws, prefix: Prefix, next_prefix: Prefix
) -> tuple[Float[Array, " b"], Float[Array, ""], dict[str, Array]]:
    """Return V(s') as a constant for the critic's target, V's own loss at s, and metrics.

    The loss fits V(s) to the target critics' value of the data's chunk. Its gradient reaches V alone.
    """
    chosen = agent.config.implicit
    next_value = jax.lax.stop_gradient(value(next_prefix.features, next_prefix.state))
    v = value(jax.lax.stop_gradient(prefix.features), prefix.state)
    q = jax.lax.stop_gradient(td.slow_value(agent, prefix, batch.actions, draws.pair_rng))
    loss = losses.implicit_value_loss(v, q, batch.sequence_mask, statistic=chosen.statistic, level=chosen.level)
    metrics = {
        "value_loss": loss,
        "v_mean": v.mean(),
        "advantage_mean": (q - v).mean(),
        "advantage_positive": (q > v).mean(),  # share of the batch
    }
    return next_value, loss, metrics
