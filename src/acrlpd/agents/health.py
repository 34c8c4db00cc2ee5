"""Whether an update may be applied, decided on the device: a NaN or a spike costs one update and no waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

MEMORY = 100  # updates that the running means look back over, and that must pass before anything counts as a spike


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What an update is skipped for, beside numbers that are not finite."""

    spike_factor: float | None = 100.0  # loss or gradient norm against its running mean; None: no spikes
    spike_floor: float = 1000.0  # below this nothing is a spike: a first success lifts sparse losses from nothing

    def __post_init__(self):
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"agent.health.spike_factor must exceed 1, got {self.spike_factor}")
        if self.spike_floor < 0:
            raise ValueError(f"agent.health.spike_floor must not be negative, got {self.spike_floor}")


@struct.dataclass
class Health:
    """Running means of the watched magnitudes, and how many updates were applied and skipped."""

    means: dict[str, Float[Array, ""]]
    applied: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]

    @classmethod
    def create(cls, names: tuple[str, ...]) -> Health:
        """Each leaf is an array of its own: an update gives all of them away."""
        means = {name: jnp.zeros(()) for name in names}
        return cls(means, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def judge(
    health: Health, magnitudes: Mapping[str, Float[Array, ""]], config: HealthConfig
) -> tuple[Bool[Array, ""], Health]:
    """Whether all magnitudes are finite and none is a spike, and the health after this update."""
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
    """``new`` where the update is applied, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda one, other: jnp.where(ok, one, other), new, old)
