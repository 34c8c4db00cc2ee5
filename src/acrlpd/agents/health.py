"""Decide on the device whether an update is applied: a NaN or a spike costs one update, and the host never waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from acrlpd import fields
from acrlpd.fields import Interval

MEMORY = 100  # window of the running means, in updates; before so many are applied, nothing counts as a spike


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """The limits beyond which an update is skipped. Numbers that are not finite are always a reason."""

    # largest ratio of a loss or gradient norm to its running mean; None: off
    spike_factor: Annotated[float, Interval("(1, inf]")] | None = 100.0
    # smaller values are no spike: a first success raises sparse-reward losses from near 0
    spike_floor: Annotated[float, Interval("[0, inf]")] = 1000.0

    def __post_init__(self):
        fields.check(self)


@struct.dataclass
class Health:
    """Running means of the watched magnitudes, and how many updates were applied and skipped."""

    means: dict[str, Float[Array, ""]]
    applied: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]

    @classmethod
    def create(cls, names: tuple[str, ...]) -> Health:
        """Create an empty record. Each leaf is a separate array because an update donates all of them."""
        means = {name: jnp.zeros(()) for name in names}
        return cls(means, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def judge(
    health: Health, magnitudes: Mapping[str, Float[Array, ""]], config: HealthConfig
) -> tuple[Bool[Array, ""], Health]:
    """Return whether all magnitudes are finite and none is a spike, and the health after this update."""
    ok = jnp.array(True)
    for name, value in magnitudes.items():
        ok &= jnp.isfinite(value)
        if config.spike_factor is not None:
            limit = jnp.maximum(config.spike_factor * health.means[name], config.spike_floor)
            ok &= (health.applied < MEMORY) | (value <= limit)
    rate = jnp.maximum(1 / (health.applied + 1.0), 1 / MEMORY)
    means = {name: mean + rate * (magnitudes.get(name, mean) - mean) for name, mean in health.means.items()}
    after = Health(
        means=keep_if(ok, means, health.means),
        applied=health.applied + ok,
        skipped=health.skipped + ~ok,
        skipped_in_a_row=jnp.where(ok, 0, health.skipped_in_a_row + 1),
    )
    return ok, after


def keep_if(ok: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return ``new`` if the update is applied, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda one, other: jnp.where(ok, one, other), new, old)
