"""Best of N: draw candidate chunks on one prefix pass and choose among them (``docs/algorithm.md``, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool, Float, Int, Key

from acrlpd.types import typed

CPU_CACHE_BYTES = 24 * 1024**2  # a program's share of a server's last-level cache; blocks of this size were fastest


def in_blocks(draw: Callable[[Any], Any], drawn: Any, *, block_size: int | None) -> Any:
    """Run ``draw(drawn)`` for all candidates at once, or in blocks of ``block_size`` to bound its activations.

    ``drawn`` and the result are pytrees whose leaves have n as first axis, such as the noise [n b h a]. Blocks run one
    after the other and give the same candidates; only the finished chunks and their scores are kept, which are small
    next to a network's activations.
    """
    n = _count(drawn)
    if block_size is None or block_size >= n:
        return draw(drawn)
    whole = n - n % block_size
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block_size, *x.shape[1:]), drawn)
    done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(draw, blocks))
    if whole == n:
        return done
    rest = draw(jax.tree.map(lambda x: x[whole:], drawn))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), done, rest)


def _count(drawn: Any) -> int:
    return jax.tree.leaves(drawn)[0].shape[0]


def fitting_block(draw: Callable[[Any], Any], drawn: Any, max_bytes: int) -> int:
    """Return how many candidates ``draw`` may handle at once so that its intermediate arrays fit; at least one.

    The number follows from shapes while the caller is traced: the bytes of one candidate times their number. The
    compiler fuses some arrays away, so the true need is lower. On a CPU they must also fit into its cache: there,
    one block after the other is much faster than all candidates at once. Blocks are as even as n allows.
    """
    if jax.default_backend() == "cpu":
        max_bytes = min(max_bytes, CPU_CACHE_BYTES)
    n = _count(drawn)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), drawn)
    program = jax.make_jaxpr(draw)(one).jaxpr
    fitting = min(n, max(1, max_bytes // max(1, intermediate_bytes(program))))
    return math.ceil(n / math.ceil(n / fitting))


def intermediate_bytes(program: core.Jaxpr, varying: Sequence[bool] | None = None) -> int:
    """Return the peak bytes of a program's own results that are alive at once, if it runs in the order it is written.

    Only results that depend on the arguments marked in ``varying`` (None: all) are counted. The others, such as
    slices of a layer's weights that the program closes over, exist once for all candidates.
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
            # inner programs lack leading operands: a branch its condition's index, a while part the other's constants
            (intermediate_bytes(inner, operands[-len(inner.invars) :]) for inner in _inner_programs(equation)),
            default=0,
        )
        peak = max(peak, sum(alive.values()) + inside)
        alive = {var: size for var, size in alive.items() if last_use.get(var, i) > i}
    return peak


def _inner_programs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yield the programs inside an equation: a loop's body, a condition's branches, a compiled function's program."""
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
    """Draw numbers for n candidates of b observations from ``distribution``, such as ``jax.random.normal``.

    ``rng`` is one key for all, or [b] keys: then each observation's numbers depend on its own key alone.
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
    """Return the chosen chunk of each observation and its index.

    The choice is greedy without ``rng`` or ``temperature``. With both (``rng`` may be one key per observation, see
    ``draw``), it is drawn from softmax(score / temperature) over the ``top_k`` best (default: all). The bonus adds
    ``diversity_bonus`` times the candidate's mean L2 distance to the others to each score.
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
def typical(candidates: Float[Array, "n b h a"], share: float) -> Bool[Array, "n b"]:
    """Return which candidates are among the ``share`` of an observation's nearest to their mean, at least one.

    The distance is L2. A critic's errors are largest on chunks that its data lacks, and the best of many candidates is
    often one of those: leaving them out is a bound on how far a choice may go, as in regularized best-of-N sampling
    (Jinnai et al. 2024, arXiv:2404.01054).
    """
    n, b = candidates.shape[:2]
    distance = jnp.linalg.norm((candidates - candidates.mean(axis=0)[None]).reshape(n, b, -1), axis=-1)
    kept = max(1, math.ceil(share * n - 1e-9))  # 0.55 * 100 is a little more than 55
    furthest = jnp.sort(distance, axis=0)[kept - 1]
    return distance <= furthest[None]


@typed
def take(candidates: Float[Array, "n b *rest"], index: Int[Array, " b"]) -> Float[Array, "b *rest"]:
    """Return ``candidates[index[b], b]`` for every b."""
    index = index.reshape(1, -1, *([1] * (candidates.ndim - 2)))
    return jnp.take_along_axis(candidates, index, axis=0)[0]


@typed
def mean_distance(candidates: Float[Array, "n b h a"]) -> Float[Array, "n b"]:
    """Return the mean L2 distance of each candidate to the n - 1 others of the same observation."""
    n, b = candidates.shape[:2]
    flat = candidates.reshape(n, b, -1)
    gram = jnp.einsum("nbd,mbd->nmb", flat, flat)
    square = jnp.einsum("nbd,nbd->nb", flat, flat)
    distance = jnp.sqrt(jnp.maximum(square[:, None] + square[None] - 2 * gram, 0.0))
    return distance.sum(axis=1) / max(n - 1, 1)
