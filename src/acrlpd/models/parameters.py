"""A module's parameters as nested dictionaries of arrays, which a compiled call takes and gives back at no cost.

``nnx.State`` holds the same under the same names, but wraps every array in an object: for a small network, unwrapping
them takes a good part of an update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Params: TypeAlias = dict[Any, Any]
"""Arrays by path. ``nnx.merge`` makes a module of them again."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Structure and parameters."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def divide(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """The parameters whose path, joined by '/', is chosen, and the others."""
    flat = flatten_dict(params)
    taken = {path for path in flat if chosen("/".join(map(str, path)))}
    return (
        unflatten_dict({path: array for path, array in flat.items() if path in taken}),
        unflatten_dict({path: array for path, array in flat.items() if path not in taken}),
    )


def join(*parts: Params) -> Params:
    """All arrays of all parts; of two with one path, the later one's."""
    return unflatten_dict({path: array for part in parts for path, array in flatten_dict(part).items()})
