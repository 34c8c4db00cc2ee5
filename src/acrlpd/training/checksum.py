"""Checksums of a checkpoint's content: of arrays on their devices, of statistics and JSON as text."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def of_arrays(groups: Mapping[str, Any]) -> dict[str, int]:
    """Return one number for each group; it changes if any bit changes, or if arrays, rows or elements change places.

    It does not depend on how the arrays are spread over devices. The first call for new shapes compiles.
    """
    sums = {
        name: [_placed_sum(array, _place(path)) for path, array in paths(tree).items()] for name, tree in groups.items()
    }
    return {name: sum(map(int, found)) % 2**32 for name, found in jax.device_get(sums).items()}


def of_text(value: Any) -> int:
    """Return the checksum of a value for JSON, whatever its layout in a file."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def of_norm_stats(norm_stats: Mapping[str, NormStats]) -> int:
    """Return the checksum of the statistics as they are written to a file, where every number keeps its value."""
    return of_text(normalize.to_dict(norm_stats))


def paths(tree: Any) -> dict[str, Any]:
    """Return every array of a tree by its path, whatever kind of container holds it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"".join(f"/{_key(key)}" for key in path): leaf for path, leaf in leaves}


def _key(key: Any) -> Any:
    """Return one key of a path as text or a number; dataclasses and tuples are stored as dictionaries."""
    return next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))


def _place(path: str) -> np.uint32:
    """Return the number from which an array's elements are counted: a hash of its name."""
    return np.uint32(zlib.crc32(path.encode()))


@jax.jit  # compiled alone, so that arrays of one shape, of which optimisers have many, share a program
def _placed_sum(array: Array, place: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """Return the sum of a hash of each element's bits and its place."""
    stride = 1
    for axis in reversed(range(array.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place + steps * jnp.uint32(stride * 0x9E3779B1 % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(_mixed(_bits(array) + place), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Apply a permutation of the numbers below 2^32 in which every bit depends on every other (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _bits(array: Array) -> UInt32[Array, "..."]:
    if array.dtype != jnp.bool_:
        array = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return array.astype(jnp.uint32)


@jax.jit
def _bit_sum(leaves: list[Array]) -> UInt32[Array, ""]:
    return sum((jnp.sum(_bits(leaf), dtype=jnp.uint32) for leaf in leaves), jnp.uint32(0))


def of_format_0(tree: Any) -> int:
    """Return the sum of all bits, which checkpoints without a format version hold."""
    return int(_bit_sum(jax.tree.leaves(tree)))
