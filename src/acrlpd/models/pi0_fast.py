"""The π₀-FAST policy (Pertsch et al. 2025, arXiv:2501.09747), number for number openpi's.

One language model reads the cameras and a text of prompt, state and action tokens, and writes action tokens one after
the other. Which token means which action, and that the state stands in the text, is the tokenizer's affair
(``data/fast_tokenizer.py``): the model knows tokens alone.
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

    action_dim: int = 32  # of the chunk that the tokens stand for, as is the horizon: the network has neither
    action_horizon: int = 32
    max_token_len: int = 250  # tokens of prompt, state and, in training, actions
    cameras: tuple[str, ...] = CAMERAS  # openpi reads all that there are, in the order of their names

    def create(self, rngs: nnx.Rngs) -> Pi0Fast:
        return Pi0Fast(self, rngs)

    def freezes(self, path: str) -> bool:
        """Whether fine-tuning with this config's adapters leaves the parameter at ``path`` alone (openpi's rule)."""
        return lora.is_frozen(path, first_expert=self.paligemma.has_lora, action_expert=False)


@struct.dataclass
class Decoding:
    """All that the next token needs of those before it; the cache has m slots for generated ones behind the prefix."""

    cache: gemma.KeysValues  # keys (rotated) and values, each [layers b p+m heads d]
    prefix_mask: Bool[Array, "b p"]
    num_generated: Int[Array, ""]  # slots that are filled


@typed
def attention_mask(valid: Bool[Array, "b t"], block_starts: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """As ``pi0.attention_mask``, with each sample's own blocks."""
    one = lambda valid, starts: pi0.attention_mask(valid[None], starts)[0]  # noqa: E731
    return jax.vmap(one)(valid, block_starts)


@typed
def token_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], loss_mask: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    """Cross entropy in nats, mean over the tokens of the mask; 0 for a sample without any."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(nats * loss_mask, axis=1) / jnp.maximum(loss_mask.sum(axis=1), 1)


class Pi0Fast(nnx.Module):
    """An autoregressive policy whose parameter paths and shapes are openpi's.

    Fresh values are drawn as π₀'s. openpi starts this model's text embedding at zero: with its image head, which is
    zero too, and logits from that same table, nothing would ever learn from scratch.
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
        """Tokens of all cameras, then of the text; which of them are valid; which begin a block.

        Images and prompt are one block; each action token (``token_ar_mask``; none if absent) is one of its own.
        """
        text, text_mask = observation.tokenized_prompt, observation.tokenized_prompt_mask
        if text is None or text_mask is None:
            raise ValueError("pi0-FAST needs tokenized_prompt and tokenized_prompt_mask (data/fast_tokenizer.py)")
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
        """Cross entropy of the tokens in ``token_loss_mask``. ``train`` switches image augmentation on.

        ``actions`` are not read: they stand in the text. Positions count padding too, as in openpi.
        """
        text, loss_mask = observation.tokenized_prompt, observation.token_loss_mask
        if text is None or loss_mask is None or observation.token_ar_mask is None:
            raise ValueError(
                "the loss needs tokenized_prompt, token_ar_mask and token_loss_mask: tokenize the prompts with their "
                "actions (data/fast_tokenizer.py)"
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
        """Scores of the first token behind images and text, and room for ``num_slots`` tokens.

        openpi rolls each sequence until its last valid token stands at the right end. The sequence stays here, and
        that token is picked: attention knows positions and masks, not places.
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
        """Scores of the token behind ``token``, which takes the next slot.

        The first generated token stands one position further than in training: openpi skips one, and its released
        weights are run so. Where a camera is masked openpi looks at its tokens and not at as many of the first ones,
        for it counts the valid tokens back from the end; here masked tokens stay unseen.
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
        """The text that the model goes on with, as openpi calls it: the tokenizer finds the chunk in it.

        Both options are static. A temperature of 0 takes the likeliest token.

        Stops behind a step in which all samples emit EOS at once, as openpi does: what a sample says after an EOS of
        its own means nothing. Zero where nothing was generated.
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
