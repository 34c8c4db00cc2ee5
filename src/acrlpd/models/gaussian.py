"""A tanh-squashed diagonal Gaussian over whole chunks, given only the state: the policy of the RLPD-AC baseline."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from acrlpd.models.flow import Prefix
from acrlpd.types import Observation

MIN_LOG_STD, MAX_LOG_STD = -20.0, 2.0
EDGE = 1 - 1e-5  # a chunk at +-1 has no finite pre-image


@dataclasses.dataclass(frozen=True)
class ChunkGaussianConfig:
    """Sizes of the Gaussian policy; hidden layers use ReLU, as in RLPD."""

    state_dim: int
    action_dim: int
    action_horizon: int = 5
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)

    def create(self, rngs: nnx.Rngs) -> ChunkGaussian:
        return ChunkGaussian(self, rngs)


class ChunkGaussian(nnx.Module):
    """A policy over chunks in [-1, 1]. Mean and log standard deviation both depend on the state."""

    def __init__(self, config: ChunkGaussianConfig, rngs: nnx.Rngs):
        self.action_dim = config.action_dim
        self.action_horizon = config.action_horizon
        self.feature_dim = 0  # the critic reads only the state
        init = nnx.initializers.xavier_uniform()
        widths = (config.state_dim, *config.hidden_dims)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        self.hidden = nnx.List([linear(a, b) for a, b in itertools.pairwise(widths)])
        self.mean = linear(widths[-1], config.action_horizon * config.action_dim)
        self.log_std = linear(widths[-1], config.action_horizon * config.action_dim)

    @staticmethod
    def is_suffix_param(path: str) -> bool:
        """Return True: all parameters are read when a chunk is drawn, none by ``encode``."""
        return True

    def encode(self, observation: Observation) -> Prefix:
        state = observation.state
        nothing = jnp.zeros((state.shape[0], 0))
        return Prefix(state=state, features=nothing, mask=nothing.astype(bool), cache=None)

    def sample(
        self, prefix: Prefix, noise: Float[Array, "n b h a"], *, steps: int | None = None
    ) -> tuple[Float[Array, "n b h a"], Float[Array, "n b"]]:
        """Return tanh(mean + std * noise) and the log-density of its first ``steps`` (by default of all)."""
        mean, log_std = self._parameters(prefix)
        raw = mean + jnp.exp(log_std) * noise
        return jnp.tanh(raw), _log_prob(*(each[:, :, :steps] for each in (raw, mean, log_std)))

    def log_prob(self, prefix: Prefix, chunks: Float[Array, "b h a"]) -> Float[Array, " b"]:
        """Return the log-density of given chunks, which are first clipped to slightly inside [-1, 1]."""
        raw = jnp.arctanh(jnp.clip(chunks, -EDGE, EDGE))
        return _log_prob(raw[None], *self._parameters(prefix))[0]

    def _parameters(self, prefix: Prefix) -> tuple[Float[Array, "1 b h a"], Float[Array, "1 b h a"]]:
        x = prefix.state
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        shape = (1, x.shape[0], self.action_horizon, self.action_dim)
        log_std = jnp.clip(self.log_std(x), MIN_LOG_STD, MAX_LOG_STD)
        return self.mean(x).reshape(shape), log_std.reshape(shape)


def _log_prob(
    raw: Float[Array, "n b h a"], mean: Float[Array, "1 b h a"], log_std: Float[Array, "1 b h a"]
) -> Float[Array, "n b"]:
    """Return the log-density of tanh(raw). 2 (log 2 - x - softplus(-2 x)) is log(1 - tanh(x)^2) without overflow."""
    normal = -0.5 * jnp.square((raw - mean) * jnp.exp(-log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    squashed = 2 * (jnp.log(2.0) - raw - jax.nn.softplus(-2 * raw))
    return jnp.sum(normal - squashed, axis=(-2, -1))
