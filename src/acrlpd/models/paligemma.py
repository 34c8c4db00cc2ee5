"""The common part of π₀, π₀.5 and π₀-FAST: PaliGemma's image tower and language stack, and the cameras they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from acrlpd.models import gemma, images, siglip
from acrlpd.types import Observation

VOCAB_SIZE = 257_152


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes that all three models have. A variant is a name or a config of ``gemma`` or ``siglip``."""

    dtype: str = "bfloat16"  # of the computation
    param_dtype: str = "float32"
    paligemma_variant: str | gemma.Config = "gemma_2b"
    vision_variant: str | siglip.Config = "so400m_14"
    image_size: int = None  # type: ignore[assignment]  # side in pixels; default: that of vision_variant
    vocab_size: int = VOCAB_SIZE
    cameras: tuple[str, ...] = ()  # in the order of their tokens; empty: no image tower
    remat: bool = True  # recompute activations in the backward pass instead of keeping them
    unroll: bool = False  # write out the layers one by one instead of in a loop: for tiny models

    def __post_init__(self):
        if self.image_size is None:
            object.__setattr__(self, "image_size", siglip.get_config(self.vision_variant).image_size)
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras names one twice: {self.cameras}")

    @property
    def paligemma(self) -> gemma.Config:
        return gemma.get_config(self.paligemma_variant)

    @property
    def vision(self) -> siglip.Config:
        return dataclasses.replace(siglip.get_config(self.vision_variant), image_size=self.image_size)


class PaliGemma(nnx.Module):
    """Image tower and language stack, with openpi's names. Without cameras there is no tower.

    ``experts`` share attention; the first reads the tokens of ``embed_cameras``. ``gemma.Gemma`` explains the rest.
    """

    def __init__(
        self,
        config: Config,
        experts: Sequence[gemma.Config],
        *,
        adaptive: Sequence[bool],
        float32_queries: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.llm = gemma.Gemma(
            experts,
            vocab_size=config.vocab_size,
            adaptive=adaptive,
            float32_queries=float32_queries,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )
        if config.cameras:
            self.img = siglip.SigLIP(
                config.vision,
                out_width=config.paligemma.width,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                remat=config.remat,
                unroll=config.unroll,
                rngs=rngs,
            )

    def preprocess(self, observation: Observation, *, augment_rng: PRNGKeyArray | None = None) -> Observation:
        """Return the model's cameras as square floats in [-1, 1], all with a mask; augmented if a key is given.

        Without a key, a second call changes nothing. Other cameras are dropped; a missing mask counts as all true.
        """
        names, side = self.config.cameras, self.config.image_size
        missing = [name for name in names if name not in observation.images]
        if missing:
            raise ValueError(
                f"the observation lacks the cameras {missing}; it has {sorted(observation.images)}. Name the robot's "
                "cameras in the config, or give a black image with a false mask for one that it does not have"
            )
        pictures = {
            name: images.resize_with_pad(images.to_float(observation.images[name]), side, side) for name in names
        }
        all_true = jnp.ones(observation.state.shape[0], bool)
        masks = {name: observation.image_masks.get(name, all_true) for name in names}
        if augment_rng is not None:
            pictures = images.augment(augment_rng, pictures)
        return dataclasses.replace(observation, images=pictures, image_masks=masks)

    def embed_cameras(self, observation: Observation) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"]]:
        """Return the concatenated tokens of all cameras of a preprocessed observation, and which tokens are valid.

        The tower reads the cameras as one batch. Without cameras there are no tokens.
        """
        names, b = self.config.cameras, observation.state.shape[0]
        if not names:
            return jnp.zeros((b, 0, self.config.paligemma.width), self.config.dtype), jnp.zeros((b, 0), bool)
        pictures = jnp.stack([observation.images[name] for name in names], axis=1)  # [b c side side 3]
        tokens = self.img(pictures.reshape(-1, *pictures.shape[2:]))
        masks = jnp.stack([observation.image_masks[name] for name in names], axis=1)  # [b c]
        return tokens.reshape(b, -1, tokens.shape[-1]), jnp.repeat(masks, tokens.shape[1], axis=1)
