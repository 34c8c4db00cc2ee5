"""The π₀-FAST policy (Pertsch et al. 2025, arXiv:2501.09747), numerically as in openpi.

One language model reads the cameras and a text of prompt, state and action tokens, and generates action tokens one by
one. The tokenizer (``data/view/fast_tokenizer.py``) writes the state into the text and maps tokens to actions: the
model knows only tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from acrlpd.models import gemma, lora, paligemma, pi0
from acrlpd.models.paligemma import PaliGemma
from acrlpd.types import Observation, typed

CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
EOS = 1


@dataclasses.dataclass(frozen=True)
class Pi0FastConfig(paligemma.Config):
    """Sizes of the model."""

    action_dim: int = 32  # this and the horizon describe the chunk that tokens encode; the network has neither
    action_horizon: int = 32
    max_token_len: int = 250  # tokens of prompt, state and, in training, actions
    cameras: tuple[str, ...] = CAMERAS  # openpi reads all cameras there are, sorted by name

    def create(self, rngs: nnx.Rngs) -> Pi0Fast:
        return Pi0Fast(self, rngs)

    def freezes(self, path: str) -> bool:
        """Return whether fine-tuning with this config's adapters freezes the parameter at ``path`` (openpi's rule)."""
        return lora.is_frozen(path, first_expert=self.paligemma.has_lora, action_expert=False)


@struct.dataclass
class Decoding:
    """The state of autoregressive decoding; after the prefix, the cache has m slots for generated tokens."""

    cache: gemma.KeysValues  # keys (rotated) and values, each [layers b p+m heads d]
    prefix_mask: Bool[Array, "b p"]
    num_generated: Int[Array, ""]  # number of filled slots


@typed
def attention_mask(valid: Bool[Array, "b t"], block_starts: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Return the mask of ``pi0.attention_mask``, with different blocks for each sample."""
    one = lambda valid, starts: pi0.attention_mask(valid[None], starts)[0]  # noqa: E731
    return jax.vmap(one)(valid, block_starts)


@typed
def token_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], loss_mask: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    """Return the cross entropy in nats, mean over the tokens of the mask; 0 for a sample without any."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(nats * loss_mask, axis=1) / jnp.maximum(loss_mask.sum(axis=1), 1)


class Pi0Fast(nnx.Module):
    """An autoregressive policy whose parameter paths and shapes are openpi's.

    Parameters are initialized like π₀'s. openpi initializes this model's text embedding with zeros: since the image
    head is zero too and the logits use the same table, such a model could never learn from scratch.
    """

    def __init__(self, config: Pi0FastConfig, rngs: nnx.Rngs):
        self.config = config
        self.action_dim = config.action_dim
        self.action_horizon = config.action_horizon
        self.PaliGemma = PaliGemma(config, [config.paligemma], adaptive=[False], float32_queries=True, rngs=rngs)

    # -- observation ---------------------------------------------------------------------------------------------

    def embed_inputs(
        self, observation: Observation
    ) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"], Bool[Array, "b p"]]:
        """Return the tokens of all cameras, then of the text; which of them are valid; which begin a block.

        Images and prompt are one block; each action token (``token_ar_mask``; none if absent) is a block of its own.
        """
        text, text_mask = observation.tokenized_prompt, observation.tokenized_prompt_mask
        if text is None or text_mask is None:
            raise ValueError("pi0-FAST needs tokenized_prompt and tokenized_prompt_mask (data/view/fast_tokenizer.py)")
        text_starts = jnp.zeros(text.shape, bool) if observation.token_ar_mask is None else observation.token_ar_mask
        tokens, mask = self.PaliGemma.embed_cameras(self.PaliGemma.preprocess(observation))
        return (
            jnp.concatenate([tokens, self.PaliGemma.llm.embed(text)], axis=1),
            jnp.concatenate([mask, text_mask], axis=1),
            jnp.concatenate([jnp.zeros(mask.shape, bool), text_starts.astype(bool)], axis=1),
        )

    # -- training ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        rng: PRNGKeyArray,
        observation: Observation,
        actions: Float[Array, "b h a"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, " b"]:
        """Return the cross entropy of the tokens in ``token_loss_mask``. ``train`` turns image augmentation on.

        ``actions`` are not read: they are part of the text. Positions also count padding, as in openpi.
        """
        text, loss_mask = observation.tokenized_prompt, observation.token_loss_mask
        if text is None or loss_mask is None or observation.token_ar_mask is None:
            raise ValueError(
                "the loss needs tokenized_prompt, token_ar_mask and token_loss_mask: tokenize the prompts with their "
                "actions (data/view/fast_tokenizer.py)"
            )
        observation = self.PaliGemma.preprocess(observation, augment_rng=rng if train else None)
        tokens, valid, block_starts = self.embed_inputs(observation)
        mask = attention_mask(valid, block_starts)
        b, p = valid.shape
        positions = jnp.broadcast_to(jnp.arange(p - 1), (b, p - 1))
        (outputs,), _ = self.PaliGemma.llm([tokens[:, :-1]], positions, mask[:, :-1, :-1])
        assert outputs is not None
        logits = self.PaliGemma.llm.logits(outputs[:, 1 - text.shape[1] :])
        return token_loss(logits, text[:, 1:], loss_mask[:, 1:])

    # -- decoding ------------------------------------------------------------------------------------------------

    def prefill(self, observation: Observation, num_slots: int) -> tuple[Float[Array, "b v"], Decoding]:
        """Return the scores of the first token after images and text, and a cache with ``num_slots`` free slots.

        openpi rolls each sequence until its last valid token is at the right end. Here the sequence stays in place and
        that token is selected: attention depends on positions and masks, not on the place in the array.
        """
        tokens, valid, block_starts = self.embed_inputs(observation)
        mask = attention_mask(valid, block_starts)
        (outputs,), cache = self.PaliGemma.llm([tokens], pi0.token_positions(valid), mask)
        assert outputs is not None
        last = jnp.max(valid * jnp.arange(valid.shape[1])[None], axis=1)
        logits = self.PaliGemma.llm.logits(jnp.take_along_axis(outputs, last[:, None, None], axis=1))[:, 0]
        slots = ((0, 0), (0, 0), (0, num_slots), (0, 0), (0, 0))
        padded = jax.tree.map(lambda x: jnp.pad(x, slots), cache)
        return logits, Decoding(cache=padded, prefix_mask=valid, num_generated=jnp.int32(0))

    def decode(self, token: Int[Array, " b"], decoding: Decoding) -> tuple[Float[Array, "b v"], Decoding]:
        """Return the scores of the token after ``token``, which takes the next slot.

        The first generated token is one position further than in training: openpi skips one, and its released weights
        are run this way. If a camera is masked, openpi counts valid tokens back from the end, so it attends to masked
        tokens and misses as many of the first ones; here masked tokens are never attended to.
        """
        b, p = decoding.prefix_mask.shape
        num_slots = decoding.cache[0].shape[2] - p
        filled = jnp.broadcast_to(jnp.arange(num_slots) < decoding.num_generated, (b, num_slots))
        mask = jnp.concatenate([decoding.prefix_mask, filled, jnp.ones((b, 1), bool)], axis=1)[:, None, :]
        positions = decoding.prefix_mask.sum(axis=1, keepdims=True) + decoding.num_generated + 1
        (outputs,), new = self.PaliGemma.llm(
            [self.PaliGemma.llm.embed(token[:, None])], positions, mask, cache=decoding.cache
        )
        assert outputs is not None
        slot = p + decoding.num_generated
        cache = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis=2), decoding.cache, new
        )
        logits = self.PaliGemma.llm.logits(outputs)[:, 0]
        return logits, dataclasses.replace(decoding, cache=cache, num_generated=decoding.num_generated + 1)

    def sample_actions(
        self,
        rng: PRNGKeyArray,
        observation: Observation,
        *,
        max_decoding_steps: int = 256,
        temperature: float = 0.0,
    ) -> Int[Array, "b steps"]:
        """Generate the tokens of a chunk (the name is openpi's): the tokenizer decodes the actions from them.

        Both options are static. A temperature of 0 takes the most likely token.

        As in openpi, generation stops after a step in which all samples emit EOS at once: tokens of a sample after
        its own first EOS mean nothing. The result is zero where nothing was generated.
        """

        def is_unfinished(carry):
            _, _, decoding, _, all_ended = carry
            return (decoding.num_generated < max_decoding_steps) & ~all_ended

        def step(carry):
            rng, logits, decoding, tokens, _ = carry
            rng, token_rng = jax.random.split(rng)
            if temperature > 0:
                token = jax.random.categorical(token_rng, logits / temperature, axis=-1)
            else:
                token = jnp.argmax(logits, axis=-1)
            tokens = tokens.at[:, decoding.num_generated].set(token)
            logits, decoding = self.decode(token, decoding)
            return rng, logits, decoding, tokens, jnp.all(token == EOS)

        logits, decoding = self.prefill(observation, max_decoding_steps)
        tokens = jnp.zeros((logits.shape[0], max_decoding_steps), jnp.int32)
        start = (rng, logits, decoding, tokens, jnp.array(False))
        return jax.lax.while_loop(is_unfinished, step, start)[3]
