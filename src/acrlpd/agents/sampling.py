"""Best of N: many candidate chunks on one prefix pass, and the choice among them (``docs/algorithm.md``, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, Int, Key

from acrlpd.types import typed

CPU_CACHE_BYTES = 24 * 1024**2  # one program's part of the last level on a server; blocks this large were the fastest


def in_blocks(draw: Callable[[jax.Array], Any], noise: Float[Array, "n b h a"], *, block_size: int | None) -> Any:
    """``draw(noise)`` for all candidates at once, or in blocks of ``block_size`` to bound its activations.

    ``draw`` returns a pytree whose leaves lead with n. Blocks run one after the other and give the same candidates;
    only the finished chunks and their scores are kept, which are small beside a network's activations.
    """
    n = noise.shape[0]
    if block_size is None or block_size >= n:
        return draw(noise)
    whole = n - n % block_size
    blocks = noise[:whole].reshape(-1, block_size, *noise.shape[1:])
    drawn = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(draw, blocks))
    if whole == n:
        return drawn
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), drawn, draw(noise[whole:]))


def fitting_block(draw: Callable[[jax.Array], Any], noise: Float[Array, "n b h a"], max_bytes: int) -> int:
    """How many candidates at a time ``draw`` may handle for its intermediate arrays to fit; at least one.

    Decided from shapes while the caller is traced: intermediates of one candidate, times their number. The compiler
    fuses some of them away, so the true need is lower. On a CPU they are to fit into its cache too: there one
    block after the other is much faster than all candidates at once. Blocks are as even as n allows.
    """
    if jax.default_backend() == "cpu":
        max_bytes = min(max_bytes, CPU_CACHE_BYTES)
    n = noise.shape[0]
    one = jax.ShapeDtypeStruct((1, *noise.shape[1:]), noise.dtype)
    program = jax.make_jaxpr(draw)(one).jaxpr
    fitting = min(n, max(1, max_bytes // max(1, intermediate_bytes(program))))
    return math.ceil(n / math.ceil(n / fitting))


def intermediate_bytes(program: core.Jaxpr, varying: Sequence[bool] | None = None) -> int:
    """Most bytes of a program's own results that are alive at once, run in the order in which it is written.

    Counted is what depends on the arguments marked in ``varying`` (None: on any). The rest, such as the slices of a
    layer's weights that the program closes over, is there once for all candidates.
    """
    varying = [True] * len(program.invars) if varying is None else varying
    counted = {id(var) for var, varies in zip(program.invars, varying, strict=True) if varies}
    last_use = {id(var): i for i, equation in enumerate(program.eqns) for var in equation.invars}
    last_use |= {id(var): len(program.eqns) for var in program.outvars}
    alive: dict[int, int] = {}
    peak = 0
    for i, equation in enumerate(program.eqns):
        operands = [id(var) in counted for var in equation.invars]
        if not any(operands):
            continue
        counted |= {id(var) for var in equation.outvars}
        alive |= {id(var): _num_bytes(var.aval) for var in equation.outvars}
        inside = max(
            # a condition's branches lack the choice, the parts of a while loop the other's constants: all at the front
            (intermediate_bytes(inner, operands[-len(inner.invars) :]) for inner in _inner_programs(equation)),
            default=0,
        )
        peak = max(peak, sum(alive.values()) + inside)
        alive = {var: size for var, size in alive.items() if last_use.get(var, i) > i}
    return peak


def _inner_programs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The body of a loop, the branches of a condition, what a compiled function does."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _num_bytes(array: Any) -> int:
    return int(array.size * array.dtype.itemsize)


def draw(
    distribution: Callable[..., Array], rng: Key[Array, "..."], n: int, b: int, shape: tuple[int, ...] = ()
) -> Float[Array, "n b *shape"]:
    """Draw numbers for n candidates of b observations, such as ``jax.random.normal``'s.

    ``rng`` is one key for all, or [b] keys: then each observation has the numbers that its key has alone.
    """
    if rng.ndim == 0:
        return distribution(rng, (n, b, *shape))
    return jax.vmap(lambda key: distribution(key, (n, *shape)), out_axes=1)(rng)


@typed
def select(
    candidates: Float[Array, "n b h a"],
    scores: Float[Array, "n b"],
    rng: Key[Array, "..."] | None = None,
    *,
    temperature: Float[Array, ""] | float | None = None,
    top_k: int | None = None,
    diversity_bonus: float = 0.0,
) -> tuple[Float[Array, "b h a"], Int[Array, " b"]]:
    """The chosen chunk of each observation and its index.

    Greedy without an ``rng``; with one (or one an observation, see ``draw``), drawn from softmax(score / temperature)
    over the ``top_k`` best (all by default). The bonus adds to each score its weight times the candidate's mean L2
    distance to the others.
    """
    if diversity_bonus:
        scores = scores + diversity_bonus * mean_distance(candidates)
    if rng is not None and temperature is not None:
        if top_k is not None and top_k < scores.shape[0]:
            cut = jax.lax.top_k(scores.T, top_k)[0][:, -1]  # [b]
            scores = jnp.where(scores >= cut[None, :], scores, -jnp.inf)
        scores = scores / temperature + draw(jax.random.gumbel, rng, scores.shape[0], scores.shape[1])
    best = jnp.argmax(scores, axis=0)
    return take(candidates, best), best


@typed
def take(candidates: Float[Array, "n b *rest"], index: Int[Array, " b"]) -> Float[Array, "b *rest"]:
    """``candidates[index[b], b]`` for every b."""
    index = index.reshape(1, -1, *([1] * (candidates.ndim - 2)))
    return jnp.take_along_axis(candidates, index, axis=0)[0]


@typed
def mean_distance(candidates: Float[Array, "n b h a"]) -> Float[Array, "n b"]:
    """Mean L2 distance of each candidate to the n - 1 others of the same observation."""
    n, b = candidates.shape[:2]
    flat = candidates.reshape(n, b, -1)
    gram = jnp.einsum("nbd,mbd->nmb", flat, flat)
    square = jnp.einsum("nbd,nbd->nb", flat, flat)
    distance = jnp.sqrt(jnp.maximum(square[:, None] + square[None] - 2 * gram, 0.0))
    return distance.sum(axis=1) / max(n - 1, 1)
