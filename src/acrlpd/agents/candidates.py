"""Best of N, once: propose candidates, rank them by the critic, choose one and finish it.

The TD target, acting, evaluation, serving and export all call ``choose``.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from acrlpd.agents import extraction as extractions
from acrlpd.agents import sampling
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.extraction import Modules
from acrlpd.models import flow
from acrlpd.models.flow import Prefix
from acrlpd.models.gaussian import ChunkGaussian
from acrlpd.types import Metrics


@struct.dataclass
class Exploration:
    """What makes a choice random: a key, or [b] keys for choices that do not depend on what else is in the batch."""

    rng: Key[Array, "..."]
    temperature: Float[Array, ""]  # of the softmax over the candidates' values


@struct.dataclass
class Chosen:
    """The candidates of each observation, their values, and the chosen one."""

    chunk: Float[Array, "b h a"]  # the chosen one, finished
    index: Int[Array, " b"]
    candidates: Float[Array, "n b h a"]  # as they were ranked
    scores: Float[Array, "n b"]
    weights: Float[Array, "n 1"] | None  # how strongly Q's gradient guided each; None: the extraction is not guided

    @property
    def values(self) -> Metrics:
        """The values by which the choice was made, with b as first axis."""
        values = {
            "q": sampling.take(self.scores, self.index),
            "q_mean": self.scores.mean(axis=0),
            "q_std": self.scores.std(axis=0),
            "q_candidates": self.scores.T,
            "chosen": self.index,
        }
        return values if self.weights is None else values | {"guidance_weight": self.weights[self.index, 0]}


def choose(
    modules: Modules,
    config: AgentConfig,
    prefix: Prefix,
    noise: Float[Array, "n b h a"],
    num_steps: int,
    explore: Exploration | None = None,
) -> Chosen:
    """Return the best of n candidates by the critic; with ``explore``, one drawn by their values and their spread."""
    chunks, scores = propose(modules, config, prefix, noise, num_steps)
    judged = modules.critic.judged(chunks)  # distances use only what the critic reads
    eligible = among_typical(config, judged, scores)
    if explore is None:
        _, best = sampling.select(judged, eligible)
    else:
        _, best = sampling.select(
            judged,
            eligible,
            explore.rng,
            temperature=explore.temperature,
            top_k=config.top_k,
            diversity_bonus=config.diversity_bonus,
        )
    chunk = _finish(modules, config, prefix, noise, chunks, best, num_steps)
    return Chosen(chunk, best, chunks, scores, guidance_weights(config, len(noise)))


def among_typical(
    config: AgentConfig, judged: Float[Array, "n b steps dims"], scores: Float[Array, "n b"]
) -> Float[Array, "n b"]:
    """Return the scores, -inf for candidates that are not among the ``typical_share``."""
    if config.typical_share == 1:
        return scores
    typical = sampling.typical(judged, config.typical_share)
    return jnp.where(typical | jnp.isnan(scores), scores, -jnp.inf)  # NaN stays, for the caller to see


def propose(
    modules: Modules, config: AgentConfig, prefix: Prefix, noise: Float[Array, "n b h a"], num_steps: int
) -> tuple[Float[Array, "n b h a"], Float[Array, "n b"]]:
    """Return n candidate chunks, drawn by the extraction on one prefix, and the critic's aggregated value of each."""
    extraction = config.make_extraction(_steps_to_rank(config, noise, num_steps))
    drawn = noise, guidance_weights(config, len(noise))

    def draw(
        drawn: tuple[Float[Array, "n b h a"], Float[Array, "n 1"] | None],
    ) -> tuple[Float[Array, "n b h a"], Float[Array, "n b"]]:
        noise, weights = drawn
        chunks = extraction.propose(_weighted(modules, weights), prefix, noise)
        return chunks, modules.critic.aggregate(modules.critic(prefix.features, prefix.state, chunks))

    block_size = {
        "parallel": lambda: None,
        "chunked": lambda: config.best_of_n_block,
        "sequential": lambda: 1,
        "auto": lambda: sampling.fitting_block(draw, drawn, config.best_of_n_bytes),
    }[config.best_of_n_strategy]()
    return sampling.in_blocks(draw, drawn, block_size=block_size)


def _finish(
    modules: Modules,
    config: AgentConfig,
    prefix: Prefix,
    noise: Float[Array, "n b h a"],
    chunks: Float[Array, "n b h a"],
    best: Int[Array, " b"],
    num_steps: int,
) -> Float[Array, "b h a"]:
    """Return the chosen candidate. If candidates were ranked after fewer Euler steps, the chosen one is drawn again
    from its own noise with all of them: the same trajectory of the flow, integrated more accurately."""
    if _steps_to_rank(config, noise, num_steps) == num_steps:
        return sampling.take(chunks, best)
    extraction = config.make_extraction(num_steps)
    weights = guidance_weights(config, len(noise))
    chosen = _weighted(modules, None if weights is None else weights[best].T)
    return extraction.propose(chosen, prefix, sampling.take(noise, best)[None])[0]


def guidance_weights(config: AgentConfig, n: int) -> Float[Array, "n 1"] | None:
    """Return how strongly Q's gradient guides each of n candidates; None if the extraction is not ``guided``."""
    weights = config.weights_of_candidates(n)
    return None if weights is None else jnp.array(weights, jnp.float32)[:, None]


def _weighted(modules: Modules, weights: Float[Array, "#n #b"] | None) -> Modules:
    if weights is None or modules.guide is None:
        return modules
    return dataclasses.replace(modules, guide=dataclasses.replace(modules.guide, weights=weights))


def _steps_to_rank(config: AgentConfig, noise: Float[Array, "n b h a"], num_steps: int) -> int:
    """Return the number of Euler steps used for ranking. A single candidate is not ranked, so it gets all steps."""
    if config.candidate_flow_steps is None or noise.shape[0] == 1:
        return num_steps
    return min(config.candidate_flow_steps, num_steps)


def unchosen(
    modules: Modules, config: AgentConfig, prefix: Prefix, noise: Float[Array, "1 b h a"], num_steps: int
) -> Float[Array, "b h a"]:
    """Return the policy's own chunk; no critic is used."""
    if config.algorithm == "rlpd_ac":
        return cast(ChunkGaussian, modules.policy).sample(prefix, noise)[0][0]
    chunks = flow.sample(modules.policy, prefix, noise, num_steps=num_steps)
    return extractions.clip(chunks, config.action_clip)[0]
