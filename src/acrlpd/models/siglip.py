"""SigLIP image tower (Zhai et al. 2023, arXiv:2303.15343): patches in, one token per patch out, no pooling."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from acrlpd.models import spelled, stacked

_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an image tower."""

    image_size: int = 224  # side in pixels
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {self.image_size} pixels")
        if self.width % self.num_heads:
            raise ValueError(f"the width {self.width} is no multiple of num_heads, {self.num_heads}")

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


VARIANTS = {
    "so400m_14": Config(),
    "mid": Config(width=384, depth=6, mlp_dim=1536, num_heads=6),
    "nano": Config(image_size=64, patch_size=16, width=64, depth=2, mlp_dim=128, num_heads=2),
}


def get_config(variant: str | Config) -> Config:
    """Return the config of a named size, or of sizes spelled out; a config is returned unchanged.

    Of a spelled tower, ``image_size`` may be left out: it has one patch until it is given another (``image_size`` of
    the model).
    """
    if isinstance(variant, Config):
        return variant
    if spelled.is_spelled(variant):
        names = [field.name for field in dataclasses.fields(Config)]
        sizes = spelled.read(variant, names, "image tower")
        return Config(**{"image_size": sizes.get("patch_size", Config.patch_size)} | sizes)
    if variant not in VARIANTS:
        raise ValueError(f"unknown image tower {variant!r}; known: {', '.join(VARIANTS)}, or give a siglip.Config")
    return VARIANTS[variant]


class PatchEmbedding(nnx.Module):
    """One dense layer for all patches (a convolution with stride equal to its window), always computed in float32."""

    def __init__(self, config: Config, *, param_dtype: str, rngs: nnx.Rngs):
        shape = (config.patch_size, config.patch_size, 3, config.width)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.width, param_dtype))

    def __call__(self, image: Float[Array, "b side side 3"]) -> Float[Array, "b rows cols d"]:
        kernel = self.kernel[...].astype(jnp.float32)
        b, side = image.shape[:2]
        p = kernel.shape[0]
        patches = image.astype(jnp.float32).reshape(b, side // p, p, side // p, p, 3)
        return jnp.einsum("biujvc,uvcd->bijd", patches, kernel) + self.bias[...].astype(jnp.float32)[None, None, None]


class SelfAttention(nnx.Module):
    """Multi-head attention over all patches, with biases; scores and softmax in the compute dtype."""

    def __init__(self, config: Config, *, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.heads = heads = (config.num_heads, config.width // config.num_heads)

        def linear(inputs: Any, outputs: Any, axis: Any) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=axis,
                kernel_init=nnx.initializers.xavier_uniform(),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(config.width, heads, -1)
        self.key = linear(config.width, heads, -1)
        self.value = linear(config.width, heads, -1)
        self.out = linear(heads, config.width, (-2, -1))
        self.is_fused = False

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        rows = x.reshape(-1, x.shape[-1])  # the dense layers get the tokens of the whole batch as one matrix
        query, key, value = (self._by_head(part, x.shape) for part in self._queries_keys_values(rows))
        query = query / jnp.asarray(math.sqrt(query.shape[-1]), query.dtype)
        weights = jax.nn.softmax(jnp.einsum("gth,gsh->gts", query, key), axis=-1)
        attended = jnp.einsum("gts,gsh->gth", weights, value).reshape(x.shape[0], self.heads[0], -1, self.heads[1])
        return self.out(jnp.moveaxis(attended, 1, 2).reshape(-1, *self.heads)).reshape(x.shape)

    def fuse(self) -> None:
        """Join the weights of queries, keys and values into one matrix (see ``stacked.unrolled``)."""
        layers = (self.query, self.key, self.value)
        options: Any = {"dtype": self.query.dtype, "param_dtype": self.query.param_dtype}
        shape = (len(layers), *self.heads)
        fused = nnx.eval_shape(lambda: nnx.LinearGeneral(self.query.in_features, shape, rngs=nnx.Rngs(0), **options))
        for name, axis in (("kernel", 1), ("bias", 0)):
            setattr(fused, name, nnx.Param(jnp.stack([getattr(layer, name)[...] for layer in layers], axis=axis)))
        self.query_key_value, self.is_fused = fused, True
        del self.query, self.key, self.value

    def _queries_keys_values(self, rows: Float[Array, "bt d"]) -> list[Float[Array, "bt n h"]]:
        if self.is_fused:
            return list(jnp.moveaxis(self.query_key_value(rows), 1, 0))
        return [layer(rows) for layer in (self.query, self.key, self.value)]

    def _by_head(self, rows: Float[Array, "bt n h"], shape: tuple[int, ...]) -> Float[Array, "bn t h"]:
        """Return one matrix per picture and head: on a CPU a few percent faster than with heads as a middle axis."""
        return jnp.moveaxis(rows.reshape(*shape[:2], *self.heads), 2, 1).reshape(-1, shape[1], self.heads[1])


class MlpBlock(nnx.Module):
    def __init__(self, config: Config, *, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                kernel_init=nnx.initializers.xavier_uniform(),
                bias_init=nnx.initializers.normal(stddev=1e-6),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.Dense_0 = linear(config.width, config.mlp_dim)
        self.Dense_1 = linear(config.mlp_dim, config.width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        rows = x.reshape(-1, x.shape[-1])
        return self.Dense_1(nnx.gelu(self.Dense_0(rows), approximate=True)).reshape(x.shape)


class EncoderBlock(nnx.Module):
    def __init__(self, config: Config, *, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.LayerNorm_0 = _layer_norm(config, dtype, param_dtype, rngs)
        self.MultiHeadDotProductAttention_0 = SelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.LayerNorm_1 = _layer_norm(config, dtype, param_dtype, rngs)
        self.MlpBlock_0 = MlpBlock(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.MultiHeadDotProductAttention_0(self.LayerNorm_0(x))
        return x + self.MlpBlock_0(self.LayerNorm_1(x))


def _layer_norm(config: Config, dtype: str, param_dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=_NORM_EPSILON, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class Encoder(nnx.Module):
    """All blocks, stacked, and the norm after them."""

    stack = "encoderblock"  # see stacked.unrolled

    def __init__(self, config: Config, *, dtype: str, param_dtype: str, remat: bool, unroll: bool, rngs: nnx.Rngs):
        self.remat = remat
        self.unroll = unroll
        self.encoderblock = stacked.create(
            lambda rngs: EncoderBlock(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs), config.depth, rngs
        )
        self.encoder_norm = _layer_norm(config, dtype, param_dtype, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        def step(block, x, _):
            return block(x), None

        x, _ = stacked.scan(self.encoderblock, step, x, remat=self.remat, unroll=self.unroll)
        return self.encoder_norm(x)


class SigLIP(nnx.Module):
    """The tower from images in [-1, 1] to tokens of the language stack's width. Initially all are 0 (openpi's head)."""

    def __init__(
        self,
        config: Config,
        *,
        out_width: int,
        dtype: str,
        param_dtype: str,
        remat: bool,
        unroll: bool,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.embedding = PatchEmbedding(config, param_dtype=param_dtype, rngs=rngs)
        position_init = nnx.initializers.normal(stddev=1 / math.sqrt(config.width))
        self.pos_embedding = nnx.Param(position_init(rngs.params(), (1, config.num_tokens, config.width), param_dtype))
        self.Transformer = Encoder(config, dtype=dtype, param_dtype=param_dtype, remat=remat, unroll=unroll, rngs=rngs)
        self.head = nnx.Linear(
            config.width,
            out_width,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, image: Float[Array, "b side side 3"]) -> Float[Array, "b t d"]:
        return self.head(self.Transformer(self.embed_patches(image)))

    def embed_patches(self, image: Float[Array, "b side side 3"]) -> Float[Array, "b t w"]:
        """Return patch tokens with position embeddings added, computed in float32 until the final cast."""
        x = self.embedding(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pos_embedding[...]
        return x.astype(self.dtype)
