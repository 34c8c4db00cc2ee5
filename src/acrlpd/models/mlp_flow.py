"""An MLP flow policy that reads only the state: the small counterpart of pi0, with the same interface.

The network is that of Q-chunking (Li et al. 2025): state, noisy chunk and flow time in, velocity out.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from acrlpd import fields
from acrlpd.fields import NOT_EMPTY, PositiveInt
from acrlpd.models.flow import Prefix
from acrlpd.types import Observation

_fan_average = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")


@dataclasses.dataclass(frozen=True)
class MLPFlowConfig:
    """Sizes of the flow MLP; the defaults are Q-chunking's."""

    state_dim: int
    action_dim: int
    action_horizon: PositiveInt = 5
    hidden_dims: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (512, 512, 512, 512)

    def __post_init__(self):
        fields.check(self)

    def create(self, rngs: nnx.Rngs) -> MLPFlow:
        return MLPFlow(self, rngs)


class MLPFlow(nnx.Module):
    """A velocity field over chunks given the state. It reads neither prompt nor images."""

    cache_batch_axis = 0

    def __init__(self, config: MLPFlowConfig, rngs: nnx.Rngs):
        self.action_dim = config.action_dim
        self.action_horizon = config.action_horizon
        self.feature_dim = 0  # the critic reads only the state
        widths = config.hidden_dims
        chunk_dim = config.action_horizon * config.action_dim

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=_fan_average, rngs=rngs)

        # One first layer in two parts, so that the state's part is computed once for all candidates and steps.
        self.state_in = linear(config.state_dim, widths[0])
        self.chunk_time_in = linear(chunk_dim + 1, widths[0])
        self.hidden = nnx.List([linear(a, b) for a, b in itertools.pairwise(widths)])
        self.out = linear(widths[-1], chunk_dim)

    @staticmethod
    def is_suffix_param(path: str) -> bool:
        """Return whether a parameter (path joined by '/') is read while denoising; ``encode`` reads the others."""
        return not path.startswith("state_in/")

    def encode(self, observation: Observation) -> Prefix:
        state = observation.state
        return Prefix(
            state=state,
            features=jnp.zeros((state.shape[0], 0), state.dtype),
            mask=jnp.zeros((state.shape[0], 0), bool),
            cache=self.state_in(state),
        )

    def velocity(
        self, prefix: Prefix, x_t: Float[Array, "n b h a"], time: Float[Array, "n b"]
    ) -> Float[Array, "n b h a"]:
        n, b = x_t.shape[:2]
        chunk_time = jnp.concatenate([x_t.reshape(n, b, -1), time[..., None]], axis=-1)
        x = jax.nn.gelu(self.chunk_time_in(chunk_time) + prefix.cache[None])
        for layer in self.hidden:
            x = jax.nn.gelu(layer(x))
        return self.out(x).reshape(x_t.shape)
