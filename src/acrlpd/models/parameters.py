"""A module's parameters as nested dictionaries of arrays, which a compiled call takes and returns without overhead.

``nnx.State`` holds the same arrays under the same names, but wraps each in an object: for a small network, unwrapping
them takes a considerable part of an update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Params: TypeAlias = dict[Any, Any]
"""Arrays by path. ``nnx.merge`` turns them into a module again."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Return the structure and the parameters of ``module``."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def divide(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """Return the parameters whose path, joined by '/', is chosen, and the others."""
    flat = flatten_dict(params)
    taken = {path for path in flat if chosen("/".join(map(str, path)))}
    return (
        unflatten_dict({path: array for path, array in flat.items() if path in taken}),
        unflatten_dict({path: array for path, array in flat.items() if path not in taken}),
    )


def join(*parts: Params) -> Params:
    """Return all arrays of all parts. If two parts have the same path, the later part's array is used."""
    return unflatten_dict({path: array for part in parts for path, array in flatten_dict(part).items()})
