"""The π₀ and π₀.5 policies (Black et al. 2024, arXiv:2410.24164; 2025, arXiv:2504.16054), numerically as in openpi.

An observation becomes prefix tokens (cameras, prompt), encoded once; a noisy action chunk becomes suffix tokens, which
attend to the prefix's keys and values. π₀ puts the state into the suffix and mixes the flow time into the action
tokens; π₀.5 feeds the time to the norms of the action expert, and the state, if it is used, goes into the prompt.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from acrlpd.models import flow, gemma, lora, paligemma
from acrlpd.models.flow import Prefix
from acrlpd.models.paligemma import PaliGemma
from acrlpd.types import Observation, typed

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # periods of the flow time's embedding


@dataclasses.dataclass(frozen=True)
class Pi0Config(paligemma.Config):
    """The choice between the two models, and the sizes of the chosen one."""

    pi05: bool = False
    action_dim: int = 32
    state_dim: int = None  # type: ignore[assignment]  # default: action_dim; openpi pads both to one width
    action_horizon: int = 50
    max_token_len: int = None  # type: ignore[assignment]  # prompt tokens; default: 200 for pi0.5, 48 for pi0
    action_expert_variant: str | gemma.Config = "gemma_300m"
    cameras: tuple[str, ...] = CAMERAS
    discrete_state_input: bool = None  # type: ignore[assignment]  # write the state into the prompt; default: pi05

    def __post_init__(self):
        super().__post_init__()
        defaults = {
            "state_dim": self.action_dim,
            "max_token_len": 200 if self.pi05 else 48,
            "discrete_state_input": self.pi05,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @property
    def action_expert(self) -> gemma.Config:
        return gemma.get_config(self.action_expert_variant)

    def create(self, rngs: nnx.Rngs) -> Pi0:
        return Pi0(self, rngs)

    def freezes(self, path: str) -> bool:
        """Return whether fine-tuning with this config's adapters freezes the parameter at ``path`` (openpi's rule)."""
        return lora.is_frozen(path, first_expert=self.paligemma.has_lora, action_expert=self.action_expert.has_lora)


def is_suffix_param(path: str) -> bool:
    """Return whether the parameter at ``path`` (joined by '/') is the action expert's or a top-level projection's.

    ``velocity`` uses only these, besides the prefix; ``encode`` uses exactly the others.
    """
    return not path.startswith("PaliGemma/") or re.fullmatch("PaliGemma/llm/.*_1(/.*)?", path) is not None


@typed
def attention_mask(valid: Bool[Array, "b t"], block_starts: Bool[Array, " t"]) -> Bool[Array, "b t t"]:
    """Return the attention mask: ``[b, i, j]`` is true where token i attends to token j.

    A true ``block_starts`` begins a new block. A token sees its own block and all earlier ones: ``[0 0 0]`` is fully
    bidirectional, ``[1 1 1]`` causal, ``[0 0 1 0]`` two blocks of two. Invalid tokens neither see nor are seen.
    """
    block = jnp.cumsum(block_starts)
    visible = block[None, :] <= block[:, None]
    return visible[None] & valid[:, None, :] & valid[:, :, None]


@typed
def token_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Count the valid tokens from 0; an invalid one repeats the last position, or has -1 before the first."""
    return jnp.cumsum(valid, axis=1) - 1


@typed
def embed_time(time: Float[Array, " b"], width: int) -> Float[Array, "b width"]:
    """Return sines, then cosines, with ``width / 2`` periods spaced geometrically from 0.004 to 4."""
    if width % 2:
        raise ValueError(f"the width of a time embedding must be even, got {width}")
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** jnp.linspace(0.0, 1.0, width // 2)
    angle = time[:, None] * (1.0 / period * 2 * jnp.pi)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


@typed
def pool(tokens: Float[Array, "b p d"], mask: Bool[Array, "b p"]) -> Float[Array, "b d"]:
    """Return the mean over the valid tokens in float32; zero if there are none."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bpd,bp->bd", tokens.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)


class Pi0(nnx.Module):
    """A flow policy (``flow.FlowPolicy``) whose parameter paths and shapes are openpi's."""

    cache_batch_axis = 1  # after the layers' axis

    def __init__(self, config: Pi0Config, rngs: nnx.Rngs):
        self.config = config
        self.action_dim = config.action_dim
        self.action_horizon = config.action_horizon
        self.feature_dim = config.paligemma.width
        width = config.action_expert.width

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            # No dtype: input and weight are promoted, so float32 weights keep these layers in float32.
            return nnx.Linear(inputs, outputs, param_dtype=config.param_dtype, rngs=rngs)

        experts = [config.paligemma, config.action_expert]
        self.PaliGemma = PaliGemma(config, experts, adaptive=[False, config.pi05], rngs=rngs)
        self.action_in_proj = linear(config.action_dim, width)
        if config.pi05:
            self.time_mlp_in = linear(width, width)
            self.time_mlp_out = linear(width, width)
        else:
            self.state_proj = linear(config.state_dim, width)
            self.action_time_mlp_in = linear(2 * width, width)
            self.action_time_mlp_out = linear(width, width)
        self.action_out_proj = linear(width, config.action_dim)

    @staticmethod
    def is_suffix_param(path: str) -> bool:
        return is_suffix_param(path)

    # -- observation ---------------------------------------------------------------------------------------------

    def embed_prefix(
        self, observation: Observation
    ) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"], Bool[Array, " p"]]:
        """Return the tokens of all cameras, then of the prompt; which are valid; which begin a block (none)."""
        tokens, mask = self.PaliGemma.embed_cameras(self.PaliGemma.preprocess(observation))
        prompt, prompt_mask = observation.tokenized_prompt, observation.tokenized_prompt_mask
        if (prompt is None) != (prompt_mask is None):
            raise ValueError("an observation has both tokenized_prompt and tokenized_prompt_mask, or neither")
        if prompt is not None and prompt_mask is not None:
            tokens = jnp.concatenate([tokens, self.PaliGemma.llm.embed(prompt)], axis=1)
            mask = jnp.concatenate([mask, prompt_mask], axis=1)
        if not mask.shape[1]:
            raise ValueError("the observation has no tokenized prompt and the model no cameras: nothing to encode")
        return tokens, mask, jnp.zeros(mask.shape[1], bool)

    def encode(self, observation: Observation) -> Prefix:
        """Run the vision-language expert once; return keys and values of every layer and the pooled input tokens."""
        tokens, mask, block_starts = self.embed_prefix(observation)
        cache = self.PaliGemma.llm.encode(tokens, token_positions(mask), attention_mask(mask, block_starts))
        return Prefix(state=observation.state, features=pool(tokens, mask), mask=mask, cache=cache)

    # -- actions -------------------------------------------------------------------------------------------------

    def embed_suffix(
        self, state: Float[Array, "b s"], x_t: Float[Array, "b h a"], time: Float[Array, " b"]
    ) -> tuple[Float[Array, "b t d"], Bool[Array, "b t"], Bool[Array, " t"], Float[Array, "b d"] | None]:
        """Return a noisy chunk's tokens, which are valid, which begin a block, and the norms' condition (pi0.5)."""
        tokens = self.action_in_proj(x_t)
        time_embedding = embed_time(time, tokens.shape[-1])
        if self.config.pi05:
            condition = nnx.swish(self.time_mlp_out(nnx.swish(self.time_mlp_in(time_embedding))))
        else:
            condition = None
            repeated = jnp.broadcast_to(time_embedding[:, None, :], tokens.shape)
            both = jnp.concatenate([tokens, repeated], axis=-1)
            tokens = self.action_time_mlp_out(nnx.swish(self.action_time_mlp_in(both)))
            tokens = jnp.concatenate([self.state_proj(state)[:, None, :], tokens], axis=1)
        # The state, if it is a token, is a block of its own; the actions are one block after it.
        first_action = tokens.shape[1] - x_t.shape[1]
        block_starts = jnp.arange(tokens.shape[1]) <= first_action
        return tokens, jnp.ones(tokens.shape[:2], bool), block_starts, condition

    def velocity(
        self, prefix: Prefix, x_t: Float[Array, "n b h a"], time: Float[Array, "n b"]
    ) -> Float[Array, "n b h a"]:
        """Return the velocity at ``x_t``. ``vmap`` maps the n candidates only: all read one copy of the cache."""
        return jax.vmap(self._velocity, in_axes=(None, 0, 0))(prefix, x_t, time)

    def _velocity(self, prefix: Prefix, x_t: Float[Array, "b h a"], time: Float[Array, " b"]) -> Float[Array, "b h a"]:
        tokens, valid, block_starts, condition = self.embed_suffix(prefix.state, x_t, time)
        b, t = valid.shape
        sees_prefix = jnp.broadcast_to(prefix.mask[:, None, :], (b, t, prefix.mask.shape[1]))
        mask = jnp.concatenate([sees_prefix, attention_mask(valid, block_starts)], axis=-1)
        positions = prefix.mask.sum(axis=1, keepdims=True) + token_positions(valid)
        (_, outputs), _ = self.PaliGemma.llm(
            [None, tokens], positions, mask, conditions=[None, condition], cache=prefix.cache
        )
        assert outputs is not None  # the second expert was given tokens
        return self.action_out_proj(outputs[:, -x_t.shape[1] :])

    # -- openpi's own interface ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        rng: PRNGKeyArray,
        observation: Observation,
        actions: Float[Array, "b h a"],
        *,
        train: bool = False,
        noise: Float[Array, "b h a"] | None = None,
        time: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h"]:
        """Return the flow matching loss, with openpi's random numbers for a key. ``train`` turns augmentation on.

        openpi runs prefix and suffix as one sequence; here the prefix is encoded first. The prefix cannot see the
        suffix, so values and gradients are the same.
        """
        augment_rng, noise_rng, time_rng = jax.random.split(rng, 3)
        if noise is None:
            noise = jax.random.normal(noise_rng, actions.shape)
        if time is None:
            time = flow.sample_time(time_rng, actions.shape[:1])
        observation = self.PaliGemma.preprocess(observation, augment_rng=augment_rng if train else None)
        return flow.flow_loss(self, self.encode(observation), actions, noise, time)

    def sample_actions(
        self,
        rng: PRNGKeyArray,
        observation: Observation,
        *,
        num_steps: int | Int[Array, ""] = 10,
        noise: Float[Array, "b h a"] | None = None,
    ) -> Float[Array, "b h a"]:
        """Sample one chunk per observation from ``noise``, which is drawn with ``rng`` if it is not given."""
        if noise is None:
            noise = jax.random.normal(rng, (observation.state.shape[0], self.action_horizon, self.action_dim))
        return flow.sample(self, self.encode(observation), noise[None], num_steps=num_steps)[0]
