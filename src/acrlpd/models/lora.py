"""Low-rank adapters of the language stack (Hu et al. 2021, arXiv:2106.09685), with openpi's two different rules.

An einsum layer scales its update and, in the attention output, sums over heads twice; a feed-forward layer does not
scale. Neither half starts at zero, so an adapter changes the output slightly even before training. All of this is
openpi's behaviour; we keep it because its checkpoints depend on it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from acrlpd import fields
from acrlpd.fields import PositiveInt

_adapter_init = nnx.initializers.normal(stddev=0.01)
_lecun_per_gate = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
_lecun = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one kind of adapter."""

    rank: PositiveInt
    alpha: float = 1.0  # einsum layers scale their update by alpha / rank
    rank_stabilized: bool = False  # alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)

    def __post_init__(self):
        fields.check(self)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def adapter_equations(equation: str) -> tuple[str, str]:
    """Return the einsums of the two halves: each replaces one of the weight's last two axes, in and out, by rank ``r``.

    ``"BTNH,NHD->BTD"`` gives ``"BTNH,NHr->BTr"`` and ``"BTr,NrD->BTD"``: the first already sums over N, so the second
    adds up the heads of its weight. That is openpi's rule, not a product per head.
    """
    inputs, weight, output = re.split(",|->", equation)
    axis_in, axis_out = weight[-2], weight[-1]
    low = output.replace(axis_out, "r")
    return f"{inputs},{weight.replace(axis_out, 'r')}->{low}", f"{low},{weight.replace(axis_in, 'r')}->{output}"


class Einsum(nnx.Module):
    """An einsum with one weight, computed in the input's dtype, with an optional adapter."""

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        init: Callable[..., jax.Array],
        adapter: Config | None,
        *,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.adapter = adapter
        self.w = nnx.Param(init(rngs.params(), tuple(shape), param_dtype))
        if adapter is not None:
            down, up = (*shape[:-1], adapter.rank), (*shape[:-2], adapter.rank, shape[-1])
            self.lora_a = nnx.Param(_adapter_init(rngs.params(), down, param_dtype))
            self.lora_b = nnx.Param(_adapter_init(rngs.params(), up, param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        result = jnp.einsum(self.equation, x, self.w[...].astype(x.dtype))
        if self.adapter is None:
            return result
        down, up = adapter_equations(self.equation)
        update = jnp.einsum(down, x, self.lora_a[...].astype(x.dtype))
        update = jnp.einsum(up, update, self.lora_b[...].astype(x.dtype))
        return result + update * self.adapter.scaling


class FeedForward(nnx.Module):
    """Gated feed-forward layer without biases: ``(gelu(x W0) * (x W1)) W2``; adapters are added unscaled."""

    def __init__(self, width: int, mlp_dim: int, adapter: Config | None, *, param_dtype: str, rngs: nnx.Rngs):
        self.has_adapter = adapter is not None
        self.is_fused = False
        self.gating_einsum = nnx.Param(_lecun_per_gate(rngs.params(), (2, width, mlp_dim), param_dtype))
        self.linear = nnx.Param(_lecun(rngs.params(), (mlp_dim, width), param_dtype))
        if adapter is not None:

            def adapter_param(*shape: int) -> nnx.Param:
                return nnx.Param(_adapter_init(rngs.params(), shape, param_dtype))

            self.gating_einsum_lora_a = adapter_param(2, width, adapter.rank)
            self.gating_einsum_lora_b = adapter_param(2, adapter.rank, mlp_dim)
            self.linear_lora_a = adapter_param(mlp_dim, adapter.rank)
            self.linear_lora_b = adapter_param(adapter.rank, width)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        rows = x.reshape(-1, x.shape[-1])  # of one matrix: with a batch of matrices, the backward pass transposes
        return self._project(gated(*self._gates(rows)), "linear").reshape(x.shape)

    def fuse(self) -> None:
        """Join the weights of the two gates into one matrix (see ``stacked.unrolled``), unless there are adapters."""
        if not self.has_adapter:
            self.gating_einsum = nnx.Param(jnp.moveaxis(self.gating_einsum[...], 0, 1))
            self.is_fused = True

    def _gates(self, rows: Float[Array, "rows d"]) -> Float[Array, "2 rows m"]:
        if self.is_fused:
            return jnp.moveaxis(jnp.einsum("td,dgm->tgm", rows, self.gating_einsum[...].astype(rows.dtype)), 1, 0)
        # Both gates in one batched product: on a CPU, computing one gate alone would copy half of the weights.
        return self._project(jnp.broadcast_to(rows, (2, *rows.shape)), "gating_einsum")

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        def weight(name: str) -> jax.Array:
            return getattr(self, name)[...].astype(x.dtype)

        result = x @ weight(name)
        if not self.has_adapter:
            return result
        return result + (x @ weight(f"{name}_lora_a")) @ weight(f"{name}_lora_b")


@jax.checkpoint
def gated(gate: Float[Array, "rows m"], value: Float[Array, "rows m"]) -> Float[Array, "rows m"]:
    """Return ``gelu(gate) * value``. The backward pass, bound by memory, keeps the two only and recomputes the rest."""
    return nnx.gelu(gate, approximate=True) * value


def is_frozen(path: str, *, first_expert: bool, action_expert: bool) -> bool:
    """Return whether openpi freezes the parameter at ``path`` (joined by '/'), given which experts have adapters.

    The base weights of an adapted expert are frozen, with its norms and the text embedding; the image tower and the
    top-level projections are never frozen.
    """
    is_action_expert = re.fullmatch(".*llm.*_1.*", path) is not None
    if "llm" not in path or "lora" in path:
        return False
    if first_expert:
        return action_expert or not is_action_expert
    return action_expert and is_action_expert


def merge(params: Mapping[str, Any], scalings: tuple[float, float]) -> dict[str, np.ndarray]:
    """Return a model's arrays with every adapter added to its base weight: the same function without adapters.

    Sums are computed in float32 and returned in the base's dtype. ``params`` are arrays by path; ``scalings`` are
    those of the einsum layers (``Config.scaling``) of the vision-language expert and of the action expert.

    Raises:
        ValueError: an adapter lacks its other half or its base weight. The message names the path.
    """
    merged = {path: np.asarray(array) for path, array in params.items() if "lora" not in path}
    for path in params:
        if not path.endswith("lora_b"):
            continue
        base = re.sub("/lora_b$", "/w", path).removesuffix("_lora_b")
        down = path[:-1] + "a"
        if down not in params or base not in merged:
            raise ValueError(f"{path}: its other half {down} or its base {base} is missing")
        update = _product(base, np.asarray(params[down], np.float32), np.asarray(params[path], np.float32))
        scaling = scalings[re.search("_1(/|$)", base) is not None] if base.endswith("/w") else 1.0
        merged[base] = (merged[base].astype(np.float32) + scaling * update).astype(merged[base].dtype)
    alone = [path for path in params if path.endswith("lora_a") and path[:-1] + "b" not in params]
    if alone:
        raise ValueError(f"{alone[0]}: its other half is missing")
    return merged


def _product(base: str, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return an adapter's weight update; for the attention output it adds up the heads (``adapter_equations``)."""
    return down @ (up.sum(axis=-3, keepdims=True) if "attn_vec_einsum" in base else up)
