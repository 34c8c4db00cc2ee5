"""Layers of equal shape stored as one module whose parameters have the depth as leading axis, as in openpi's files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

T = TypeVar("T")


def create(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Create ``depth`` modules with ``make``, each with its own random numbers, and stack them."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(layer_rngs: nnx.Rngs) -> nnx.Module:
        return make(layer_rngs)

    return make_all(rngs)


def unrolled(model: T) -> T:
    """Return ``model`` with the layers as separate modules in each part that unrolls its ``stack``; the rest is shared.

    On a CPU, taking a layer out of a stacked array copies it, and weights whose first axis is not the one summed over
    are rearranged for every product. Both are done here once, instead of in every pass and flow step; modules of a
    layer that have a ``fuse`` method are fused. Callers that keep the result pay only once.
    """
    copy: Any = nnx.merge(*nnx.split(model))
    parts: list[Any] = [part for _, part in nnx.iter_modules(copy) if getattr(part, "unroll", False)]
    for part in parts:
        layers = getattr(part, part.stack)
        if not isinstance(layers, nnx.List):
            graphdef, state = nnx.split(layers)
            setattr(part, part.stack, nnx.List([_fused(nnx.merge(graphdef, layer)) for layer in _unstack(state)]))
    return copy


def _fused(layer: Any) -> Any:
    for _, module in list(nnx.iter_modules(layer)):
        if hasattr(module, "fuse"):
            module.fuse()
    return layer


def scan(
    layers: nnx.Module,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: bool,
    unroll: bool,
) -> tuple[Any, Any]:
    """Run ``step(layer, carry, x) -> (carry, y)`` over all layers; ``xs`` and the ``y`` have one slice per layer.

    ``remat`` keeps only the carry between layers and recomputes the rest in the backward pass. ``unroll`` writes out
    the layers one by one: slower to compile, but faster for few layers, because their activations are not copied into
    one array. With ``unroll``, NumPy arrays in ``xs`` stay NumPy arrays, so a ``step`` may branch on them.
    """
    if isinstance(layers, nnx.List):  # see unrolled
        graphdef, states = nnx.graphdef(layers[0]), [nnx.state(layer) for layer in layers]
    else:
        graphdef, stack = nnx.split(layers)
        states = _unstack(stack) if unroll else []

    def run(carry, layer_state, x):
        return step(nnx.merge(graphdef, layer_state), carry, x)

    def rematerialised(function):
        # Inside a loop the compiler cannot merge the recomputation with the forward pass; in an unrolled one it could.
        return jax.checkpoint(function, prevent_cse=unroll) if remat else function

    if not unroll:
        return jax.lax.scan(rematerialised(lambda carry, inputs: run(carry, *inputs)), carry, (stack, xs))
    results = []
    for layer_state, x in zip(states, [None] * len(states) if xs is None else _unstack(xs), strict=True):
        carry, y = rematerialised(functools.partial(run, x=x))(carry, layer_state)
        results.append(y)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)


def _unstack(tree: Any) -> list[Any]:
    """Split a tree of arrays whose first axis is the layers into one tree per layer."""
    leaves, structure = jax.tree.flatten(tree)
    rows = [leaf if isinstance(leaf, np.ndarray) else jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*rows, strict=True)]
