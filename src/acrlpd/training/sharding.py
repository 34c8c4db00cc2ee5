"""Placement of arrays: batches are split over all devices, large parameters over the fsdp axis (openpi's rule)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from acrlpd.data import loader
from acrlpd.types import ChunkBatch

BATCH_AXIS, FSDP_AXIS = "batch", "fsdp"
MIN_SHARDED_BYTES = 4 * 1024**2  # smaller arrays cost more to gather than to keep


def make_mesh(fsdp_devices: int) -> Mesh:
    """Return a (batch, fsdp) mesh over all devices."""
    count = jax.device_count()
    if fsdp_devices < 1 or count % fsdp_devices:
        raise ValueError(f"fsdp_devices ({fsdp_devices}) must divide the number of devices ({count})")
    return jax.make_mesh(
        (count // fsdp_devices, fsdp_devices),
        (BATCH_AXIS, FSDP_AXIS),
        axis_types=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Auto),
    )


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Return a sharding of the batch axis over every device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (BATCH_AXIS, FSDP_AXIS)))


def parameter_sharding(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Return a sharding for each leaf: a large array is split on its largest axis that the fsdp size divides."""

    def place(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        size = mesh.shape[FSDP_AXIS]
        large = leaf.size * leaf.dtype.itemsize >= MIN_SHARDED_BYTES and leaf.ndim >= 2
        axes = [axis for axis in np.argsort(leaf.shape)[::-1] if leaf.shape[axis] % size == 0]
        if size == 1 or not large or not axes:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*([None] * int(axes[0])), FSDP_AXIS))

    return jax.tree.map(place, tree)


def put_batch(batches: Sequence[ChunkBatch], mesh: Mesh) -> ChunkBatch:
    """Return a host's share of a batch as global arrays, transferred without waiting; several are stacked first.

    For one device the arrays stay on the host: a compiled call transfers them several times faster than one by one.
    """
    several = len(batches) > 1
    batch = jax.tree.map(lambda *x: np.stack(x), *batches) if several else batches[0]
    if mesh.size == 1:
        return batch
    return loader.place(batch, batch_sharding(mesh, axis=1 if several else 0))
