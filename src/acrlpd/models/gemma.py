"""Gemma language stack with two experts that share attention: the vision-language model and the action expert.

Each expert has its own width and weights; queries, keys and values of both are concatenated in one attention. Parameter
names are openpi's: those of the second expert end in ``_1``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from acrlpd.models import lora, spelled, stacked
from acrlpd.types import AnyArray, typed

NORM_EPSILON = 1e-6
MASKED_SCORE = -2.3819763e38  # finite: a query whose keys are all masked attends to all of them instead of giving NaN
ROPE_BASE = 10_000.0

Tokens: TypeAlias = Sequence[Float[Array, "b t d"] | None]
"""One token sequence per expert; ``None`` for an expert that takes no part."""

KeysValues: TypeAlias = tuple[Float[Array, "*layers b s k h"], Float[Array, "*layers b s k h"]]
"""Keys (rotated) and values."""

Rotation: TypeAlias = tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]
"""Sines and cosines of each token's position, for one half of a head."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one expert. Experts of one stack may differ only in ``width``, ``mlp_dim`` and LoRA adapters."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_lora: lora.Config | None = None
    mlp_lora: lora.Config | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or self.num_heads == self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}) and larger: "
                "with equal numbers openpi stores queries, keys and values in one array, which no released model does"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")

    @property
    def has_lora(self) -> bool:
        return self.attention_lora is not None or self.mlp_lora is not None

    @property
    def adapter_scaling(self) -> float:
        """The factor of an attention adapter's update; 1 without an adapter."""
        return self.attention_lora.scaling if self.attention_lora else 1.0


def _with_lora(config: Config, rank: int) -> Config:
    adapter = lora.Config(rank=rank, alpha=float(rank))
    return dataclasses.replace(config, attention_lora=adapter, mlp_lora=adapter)


_GEMMA_2B = Config(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
_GEMMA_300M = dataclasses.replace(_GEMMA_2B, width=1024, mlp_dim=4096)

VARIANTS = {
    "gemma_2b": _GEMMA_2B,
    "gemma_2b_lora": _with_lora(_GEMMA_2B, rank=16),
    "gemma_300m": _GEMMA_300M,
    "gemma_300m_lora": _with_lora(_GEMMA_300M, rank=32),
    "dummy": Config(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),  # openpi's debug size
    "mid": Config(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    "mid_expert": Config(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
    "nano": Config(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    "nano_expert": Config(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
}


def get_config(variant: str | Config) -> Config:
    """Return the config of a named size, or of sizes spelled out; a config is returned unchanged."""
    if isinstance(variant, Config):
        return variant
    if spelled.is_spelled(variant):
        return _of_sizes(variant)
    if variant not in VARIANTS:
        raise ValueError(f"unknown language model {variant!r}; known: {', '.join(VARIANTS)}, or give a gemma.Config")
    return VARIANTS[variant]


_SIZES = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
_ADAPTERS = ("attention_lora", "attention_lora_alpha", "mlp_lora")


def _of_sizes(text: str) -> Config:
    """Return the config that ``recognize`` spells. Alpha of an attention adapter, which no weights tell, is added."""
    sizes = spelled.read(text, (*_SIZES, *_ADAPTERS), "language model")
    if missing := [name for name in _SIZES if name not in sizes]:
        raise ValueError(f"language model {text!r}: {' and '.join(missing)} missing")
    rank, alpha, mlp_rank = (sizes.get(name) for name in _ADAPTERS)
    if (rank is None) != (alpha is None):
        raise ValueError(
            f"language model {text!r}: an attention adapter needs attention_lora (its rank) and attention_lora_alpha; "
            "alpha is not stored with weights: take it from the configuration that the model was trained with"
        )
    return Config(
        **{name: sizes[name] for name in _SIZES},
        attention_lora=None if rank is None or alpha is None else lora.Config(rank, float(alpha)),
        mlp_lora=None if mlp_rank is None else lora.Config(mlp_rank),  # its alpha has no effect, as in openpi
    )


def expert_name(name: str, expert: int) -> str:
    """Return openpi's parameter name: the first expert's has no suffix, the others' end in their number."""
    return name if expert == 0 else f"{name}_{expert}"


@typed
def rotation(positions: Int[Array, "b t"], head_dim: int) -> Rotation:
    """Return the angles of the rotary embedding (Su et al. 2021, arXiv:2104.09864), the same in all layers."""
    half = head_dim // 2
    wavelength = ROPE_BASE ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions[..., None] / wavelength[None, None])[:, :, None, :]
    return jnp.sin(angle), jnp.cos(angle)


@typed
def rotate(x: Float[Array, "b t n h"], rotation: Rotation) -> Float[Array, "b t n h"]:
    """Rotate the two halves of each head as pairs, in float32."""
    sin, cos = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@typed
def attend(
    queries: Float[Array, "b t n h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b t p_and_s"],
    cache: tuple[Float[Array, "b p k h"], Float[Array, "b p k h"]] | None = None,
) -> Float[Array, "b t n h"]:
    """Attend to cached and new keys under one float32 softmax; n/k query heads share a key head.

    The two parts are never concatenated in memory: under a ``vmap`` over candidates that does not map the cache, all
    candidates read one copy of it.
    """
    b, t, n, h = queries.shape
    k = keys.shape[2]
    rows = jnp.moveaxis(queries.reshape(b, t, k, n // k, h), 1, 2).reshape(b, k, -1, h)  # one matrix per key head
    parts = [(keys, values, mask)]
    if cache is not None:
        num_cached = cache[0].shape[1]
        parts = [(*cache, mask[..., :num_cached]), (keys, values, mask[..., num_cached:])]

    def masked_scores(keys, mask):
        # Add a large negative bias instead of selecting: same result, and XLA fuses a sum into the matrix product.
        bias = jnp.repeat(jnp.where(mask, 0.0, MASKED_SCORE), n // k, axis=1)[:, None]
        return jnp.einsum("bkqh,bskh->bkqs", rows, keys, preferred_element_type=jnp.float32) + bias

    scores = [masked_scores(part_keys, part_mask) for part_keys, _, part_mask in parts]
    highest = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in scores])
    weights = [jnp.exp(part - jax.lax.stop_gradient(highest)) for part in scores]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    # Dividing the attended values is cheaper (they are fewer), but openpi rounds the weights after the division.
    divides_weights = values.dtype != jnp.float32
    if divides_weights:
        weights = [part / total for part in weights]
    attended = [
        jnp.einsum(
            "bkqs,bskh->bkqh",
            part.astype(values.dtype),
            part_values,
            preferred_element_type=jnp.float32,
        )
        for part, (_, part_values, _) in zip(weights, parts, strict=True)
    ]
    joined = sum(attended[1:], start=attended[0])
    joined = (joined if divides_weights else joined / total).astype(values.dtype)
    return jnp.moveaxis(joined.reshape(b, k, t, n // k, h), 2, 1).reshape(b, t, n, h)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, plain or adaptive; returns the result and the gate of the residual branch it feeds.

    Plain: the result is multiplied by ``1 + scale``; no gate. Adaptive (pi0.5): scale, shift and gate come from a
    condition and are zero at initialization, so the branch is closed at first.
    """

    def __init__(self, width: int, *, adaptive: bool, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.adaptive = adaptive
        if adaptive:
            self.Dense_0 = nnx.Linear(
                width,
                3 * width,
                kernel_init=nnx.initializers.zeros,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        else:
            self.scale = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(
        self, x: Float[Array, "b t d"], condition: Float[Array, "b d"] | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"] | None]:
        wide = x.astype(jnp.float32)
        normed = wide * jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPSILON))
        if not self.adaptive:
            # openpi's code sums in the parameter's dtype, but compiled, the sum stays in float32 (XLA's excess
            # precision): only float32 reproduces openpi's numbers with bfloat16 weights.
            scale = 1 + self.scale[...].astype(jnp.float32)
            return (normed * scale[None, None]).astype(x.dtype), None
        if condition is None:
            raise ValueError("an adaptive norm needs a condition: give one for every present expert of this kind")
        scale, shift, gate = jnp.split(self.Dense_0(condition)[:, None, :], 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate


def add_residual(
    x: Float[Array, "b t d"] | None, update: Float[Array, "b t d"] | None, gate: Float[Array, "b 1 d"] | None
) -> Float[Array, "b t d"] | None:
    """Return ``x + update``, times the gate of an adaptive norm if there is one; ``None`` for an absent expert."""
    if x is None or update is None:
        return None
    return x + update if gate is None else x + update * gate


class Embedder(nnx.Module):
    """Embedding of text tokens, scaled by the square root of the width (computed in the table's dtype)."""

    def __init__(self, vocab_size: int, width: int, *, param_dtype: str, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev=0.01)
        self.input_embedding = nnx.Param(init(rngs.params(), (vocab_size, width), param_dtype))

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        vectors = self.input_embedding[...][tokens]
        return vectors * jnp.asarray(math.sqrt(vectors.shape[-1]), vectors.dtype)


class Attention(nnx.Module):
    """The projections of all experts and the attention they share."""

    def __init__(self, configs: Sequence[Config], *, float32_queries: bool, param_dtype: str, rngs: nnx.Rngs):
        self.num_experts, self.num_heads, self.head_dim = len(configs), configs[0].num_heads, configs[0].head_dim
        self.float32_queries = float32_queries
        self.is_fused = False
        for i, config in enumerate(configs):
            n, k, h, d = config.num_heads, config.num_kv_heads, config.head_dim, config.width
            einsums: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
                "q_einsum": ("TD,NDH->TNH", (n, d, h), {"in_axis": -2, "batch_axis": (0,)}),
                "kv_einsum": ("SD,CKDH->CSKH", (2, k, d, h), {"in_axis": -2, "batch_axis": (0, 1)}),
                # Heads are A: einsum sums in alphabetical order, which then is the memory order of rows and weight.
                "attn_vec_einsum": ("TAH,AHD->TD", (n, h, d), {"in_axis": (-3, -2)}),
            }
            for name, (equation, shape, fans) in einsums.items():
                init = nnx.initializers.lecun_normal(out_axis=-1, **fans)
                layer = lora.Einsum(equation, shape, init, config.attention_lora, param_dtype=param_dtype, rngs=rngs)
                setattr(self, expert_name(name, i), layer)

    def fuse(self) -> None:
        """Join queries, keys and values into one product, whose weight has the axis that is summed over first.

        LoRA adapters have a separate rule for each of the three, so with any adapter nothing is changed.
        """
        experts = range(self.num_experts)
        if any(getattr(self, expert_name("q_einsum", i)).adapter for i in experts):
            return
        for i in experts:
            queries, keys_values = (getattr(self, expert_name(name, i)).w[...] for name in ("q_einsum", "kv_einsum"))
            heads = jnp.concatenate([queries, keys_values.reshape(-1, *keys_values.shape[2:])])  # [n+2k d h]
            setattr(self, expert_name("heads", i), nnx.Param(jnp.moveaxis(heads, 1, 0)))
            delattr(self, expert_name("q_einsum", i))
            delattr(self, expert_name("kv_einsum", i))
        self.is_fused = True

    def queries_keys_values(self, xs: Tokens, rotation: Rotation) -> tuple[Float[Array, "b t n h"], KeysValues]:
        """Return queries, keys and values of all present experts, concatenated."""
        if not self.is_fused:
            return self.queries(xs, rotation), self.keys_values(xs, rotation)
        heads = self._project_heads(xs, slice(None))
        queries, keys_values = heads[:, :, : self.num_heads], heads[:, :, self.num_heads :]
        keys, values = jnp.split(keys_values, 2, axis=2)
        return self._rotate_queries(queries, rotation), (rotate(keys, rotation), values)

    def queries(self, xs: Tokens, rotation: Rotation) -> Float[Array, "b t n h"]:
        """Return only the queries, of a layer that is not fused."""
        return self._rotate_queries(jnp.concatenate(self._project("q_einsum", xs, token_axis=0), axis=1), rotation)

    def keys_values(self, xs: Tokens, rotation: Rotation) -> KeysValues:
        """Return only the keys and values."""
        if self.is_fused:
            keys, values = jnp.split(self._project_heads(xs, slice(self.num_heads, None)), 2, axis=2)
        else:
            keys, values = jnp.concatenate(self._project("kv_einsum", xs, token_axis=1), axis=2)
        return rotate(keys, rotation), values

    def __call__(
        self,
        xs: Tokens,
        queries: Float[Array, "b t n h"],
        new: KeysValues,
        mask: Bool[Array, "b t p_and_s"],
        cache: KeysValues | None,
    ) -> list[Float[Array, "b t d"] | None]:
        """Return the attention output for the tokens ``xs``, in each expert's own width."""
        return self._project_back(attend(queries, *new, mask, cache), xs)

    def _rotate_queries(self, queries: Float[Array, "b t n h"], rotation: Rotation) -> Float[Array, "b t n h"]:
        if self.float32_queries:
            queries = queries.astype(jnp.float32)
        return rotate(queries, rotation) * self.head_dim**-0.5

    def _project_heads(self, xs: Tokens, chosen: slice) -> Float[Array, "b t n h"]:
        """Compute the chosen ones of the fused heads; tokens are reshaped as in ``_project``."""
        outputs = []
        for i, x in enumerate(xs):
            if x is not None:
                weight = getattr(self, expert_name("heads", i))[:, chosen].astype(x.dtype)
                rows = jnp.einsum("td,dnh->tnh", x.reshape(-1, x.shape[-1]), weight)
                outputs.append(rows.reshape(*x.shape[:2], *rows.shape[1:]))
        return jnp.concatenate(outputs, axis=1)

    def _project(self, name: str, xs: Tokens, *, token_axis: int) -> list[jax.Array]:
        """Apply the layers ``name`` of all present experts, each to its whole batch's tokens as rows of one matrix."""

        def project(layer: lora.Einsum, x: Float[Array, "b t d"]) -> jax.Array:
            y = layer(x.reshape(-1, x.shape[-1]))
            return y.reshape(*y.shape[:token_axis], *x.shape[:2], *y.shape[token_axis + 1 :])

        return [project(getattr(self, expert_name(name, i)), x) for i, x in enumerate(xs) if x is not None]

    def _project_back(self, attended: Float[Array, "b t n h"], xs: Tokens) -> list[Float[Array, "b t d"] | None]:
        outputs: list[jax.Array | None] = []
        start = 0
        for i, x in enumerate(xs):
            if x is None:
                outputs.append(None)
                continue
            own = attended[:, start : start + x.shape[1]]
            start += x.shape[1]
            layer = getattr(self, expert_name("attn_vec_einsum", i))
            outputs.append(layer(own.reshape(-1, *own.shape[2:])).reshape(x.shape))
        return outputs


class Block(nnx.Module):
    """One layer of all experts."""

    def __init__(
        self,
        configs: Sequence[Config],
        *,
        adaptive: Sequence[bool],
        float32_queries: bool,
        dtype: str,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.attn = Attention(configs, float32_queries=float32_queries, param_dtype=param_dtype, rngs=rngs)
        for i, config in enumerate(configs):
            for name in ("pre_attention_norm", "pre_ffw_norm"):
                norm = RMSNorm(config.width, adaptive=adaptive[i], dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                setattr(self, expert_name(name, i), norm)
            mlp = lora.FeedForward(config.width, config.mlp_dim, config.mlp_lora, param_dtype=param_dtype, rngs=rngs)
            setattr(self, expert_name("mlp", i), mlp)

    def __call__(
        self,
        xs: Tokens,
        rotation: Rotation,
        mask: Bool[Array, "b t p_and_s"],
        conditions: Sequence[Float[Array, "b d"] | None],
        cache: KeysValues | None,
        keys_values_only: Bool[AnyArray, ""] | bool = False,
    ) -> tuple[list[Float[Array, "b t d"] | None], KeysValues]:
        """Return the tokens after this layer, and their keys and values in it.

        If ``keys_values_only`` (a bool, or an array on the device) is true, the tokens are returned unchanged.
        """
        normed, gates = self._norm("pre_attention_norm", xs, conditions)

        def finish(xs, queries, new):
            attended = self.attn(normed, queries, new, mask, cache)
            xs = [add_residual(*branch) for branch in zip(xs, attended, gates, strict=True)]
            inputs, mlp_gates = self._norm("pre_ffw_norm", xs, conditions)
            outputs = [None if x is None else getattr(self, expert_name("mlp", i))(x) for i, x in enumerate(inputs)]
            return [add_residual(*branch) for branch in zip(xs, outputs, mlp_gates, strict=True)]

        if isinstance(keys_values_only, jax.Array):
            new = self.attn.keys_values(normed, rotation)

            def through(xs):
                return finish(xs, self.attn.queries(normed, rotation), new)

            return jax.lax.cond(keys_values_only, lambda xs: xs, through, list(xs)), new
        if keys_values_only:
            return list(xs), self.attn.keys_values(normed, rotation)
        queries, new = self.attn.queries_keys_values(normed, rotation)
        return finish(list(xs), queries, new), new

    def _norm(self, name: str, xs: Tokens, conditions: Sequence[jax.Array | None]) -> tuple[list, list]:
        results = [
            (None, None) if x is None else getattr(self, expert_name(name, i))(x, conditions[i])
            for i, x in enumerate(xs)
        ]
        return [normed for normed, _ in results], [gate for _, gate in results]


class Gemma(nnx.Module):
    """The stack: text embedding of the first expert, all layers, final norms. It has no separate output head.

    ``float32_queries`` keeps queries in float32 after their rotation (pi0-FAST); other models cast back to ``dtype``.
    """

    stack = "layers"  # see stacked.unrolled

    def __init__(
        self,
        configs: Sequence[Config],
        *,
        vocab_size: int,
        adaptive: Sequence[bool],
        dtype: str,
        param_dtype: str,
        remat: bool,
        unroll: bool,
        rngs: nnx.Rngs,
        float32_queries: bool = False,
    ):
        _check_experts_match(configs)
        self.dtype = dtype
        self.depth, self.head_dim = configs[0].depth, configs[0].head_dim
        self.remat = remat
        self.unroll = unroll
        self.embedder = Embedder(vocab_size, configs[0].width, param_dtype=param_dtype, rngs=rngs)
        self.layers = stacked.create(
            lambda rngs: Block(
                configs,
                adaptive=adaptive,
                float32_queries=float32_queries,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            ),
            self.depth,
            rngs,
        )
        for i, config in enumerate(configs):
            norm = RMSNorm(config.width, adaptive=adaptive[i], dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            setattr(self, expert_name("final_norm", i), norm)

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.embedder(tokens).astype(self.dtype)

    def logits(self, outputs: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Return next-token scores against the embedding table, in the wider dtype of the two."""
        return jnp.einsum("btd,vd->btv", outputs, self.embedder.input_embedding[...])

    def __call__(
        self,
        tokens: Tokens,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t p_and_s"],
        conditions: Sequence[Float[Array, "b d"] | None] = (None, None),
        cache: KeysValues | None = None,
    ) -> tuple[list[Float[Array, "b t d"] | None], KeysValues]:
        """Return each expert's outputs after its final norm, and keys and values of the given (not cached) tokens.

        ``positions`` and ``mask`` run over the concatenated tokens of the present experts; in the mask's last axis
        the cached tokens come first.
        """
        rotated_by = rotation(positions, self.head_dim)

        def step(block, xs, layer_cache):
            return block(xs, rotated_by, mask, conditions, layer_cache)

        xs, new = self._scan(step, tokens, cache)
        outputs = [
            None if x is None else getattr(self, expert_name("final_norm", i))(x, conditions[i])[0]
            for i, x in enumerate(xs)
        ]
        return outputs, new

    def encode(
        self, tokens: Float[Array, "b p d"], positions: Int[Array, "b p"], mask: Bool[Array, "b p p"]
    ) -> KeysValues:
        """Return keys and values of the first expert's tokens in every layer, each [depth b p k h].

        The tokens after the last layer are never read, so for that layer only keys and values are computed.
        """
        rotated_by = rotation(positions, self.head_dim)

        def step(block, xs, is_last):
            return block(xs, rotated_by, mask, (None,), None, keys_values_only=is_last)

        return self._scan(step, [tokens], np.arange(self.depth) == self.depth - 1)[1]

    def _scan(
        self, step: Callable[..., Any], tokens: Tokens, xs: Any
    ) -> tuple[list[Float[Array, "b t d"] | None], KeysValues]:
        carry = [None if x is None else x.astype(self.dtype) for x in tokens]
        return stacked.scan(self.layers, step, carry, xs, remat=self.remat, unroll=self.unroll)


def _check_experts_match(configs: Sequence[Config]) -> None:
    shared = [(config.depth, config.num_heads, config.num_kv_heads, config.head_dim) for config in configs]
    if len(set(shared)) > 1:
        raise ValueError(
            "experts that share attention must agree in (depth, num_heads, num_kv_heads, head_dim), got "
            + " and ".join(map(str, shared))
        )
