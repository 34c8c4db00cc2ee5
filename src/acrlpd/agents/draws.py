"""All random numbers of one update. They are drawn for the whole batch, so a micro-batch can take its own share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents.config import AgentConfig
from acrlpd.models import flow


@struct.dataclass
class Draws:
    """The noise of one update, by purpose, and two keys for random numbers that do not belong to single chunks."""

    candidates: Float[Array, "n b h a"]  # at s', for the TD target; n is 0 if it is implicit
    flow_noise: Float[Array, "b h a"]
    flow_time: Float[Array, " b"]
    actor: Float[Array, "m b h a"]
    pair_rng: PRNGKeyArray  # chooses the pair of critics under q_aggregation="subset"
    dropout_rng: PRNGKeyArray

    @classmethod
    def of_update(cls, rng: PRNGKeyArray, config: AgentConfig, shape: tuple[int, int, int]) -> Draws:
        """Draw the numbers of one update; ``shape`` is (b, h, a) with the policy's own h and a."""
        target_rng, pair_rng, noise_rng, time_rng, actor_rng, dropout_rng = jax.random.split(rng, 6)
        return cls(
            candidates=jax.random.normal(target_rng, (config.candidates_in_target, *shape)),
            flow_noise=jax.random.normal(noise_rng, shape),
            flow_time=flow.sample_time(time_rng, shape[:1]),
            actor=jax.random.normal(actor_rng, (config.actor_draws, *shape)),
            pair_rng=pair_rng,
            dropout_rng=dropout_rng,
        )

    def deal(self, parts: int) -> Draws:
        """Deal the draws to micro-batches like the batch itself. All share one pair of critics; dropout differs."""
        return Draws(
            candidates=deal(self.candidates, parts, axis=1),
            flow_noise=deal(self.flow_noise, parts),
            flow_time=deal(self.flow_time, parts),
            actor=deal(self.actor, parts, axis=1),
            pair_rng=jnp.broadcast_to(self.pair_rng, (parts, *self.pair_rng.shape)),
            dropout_rng=jax.random.split(self.dropout_rng, parts),
        )


def deal(tree: Any, parts: int, *, axis: int = 0) -> Any:
    """Return micro-batches along a new leading axis, dealt like cards: the k-th has the rows k, k + parts, ...

    If the batch is split over devices in blocks of rows, every device then holds its share of every micro-batch.
    """

    def one(x: Array) -> Array:
        size = x.shape[axis]
        if size % parts:
            raise ValueError(
                f"a batch of {size} does not divide into {parts} micro-batches: change data.batch_size or "
                "agent.gradient_accumulation_steps"
            )
        split = x.reshape(*x.shape[:axis], size // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis + 1, 0)

    return jax.tree.map(one, tree)
