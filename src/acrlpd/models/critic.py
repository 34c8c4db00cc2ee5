"""The critic ensemble: Q of a whole action chunk, with all members in one stacked network; and V of an observation.

The leading axis of every parameter is the member, so ten critics are one batched matrix product per layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.types import typed

Activation = Literal["relu", "swish", "gelu", "tanh"]
QAggregation = Literal["min", "mean", "weighted", "subset"]
FeatureFusion = Literal["concat", "add", "mlp"]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The size and shape of the ensemble, and the aggregation of its members to one value."""

    num_critics: int = 10
    hidden_dims: tuple[int, ...] = (256, 256)
    activation: Activation = "gelu"
    use_layer_norm: bool = True
    dropout_rate: float = 0.0  # off in targets and while acting
    kernel_init_scale: float = 1.0  # variance scaling, fan-in, uniform
    q_aggregation: QAggregation = "min"
    use_pi0_features: bool = True  # read the policy's pooled prefix tokens and the state; False: only the state
    feature_fusion_method: FeatureFusion = "concat"

    def __post_init__(self):
        for name, choices in (
            ("activation", Activation),
            ("q_aggregation", QAggregation),
            ("feature_fusion_method", FeatureFusion),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"critic.{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if self.num_critics < 1 or (self.q_aggregation == "subset" and self.num_critics < 2):
            raise ValueError(
                f"critic.num_critics is {self.num_critics}: at least 1, and at least 2 for q_aggregation='subset'"
            )
        if not self.hidden_dims:
            raise ValueError("critic.hidden_dims is empty: name at least one width, such as (256, 256)")
        if any(width < 1 for width in self.hidden_dims):
            raise ValueError(f"critic.hidden_dims must be at least 1 each, got {self.hidden_dims}")
        if not self.kernel_init_scale > 0:
            raise ValueError(f"critic.kernel_init_scale must be positive, got {self.kernel_init_scale}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"critic.dropout_rate must lie in [0, 1), got {self.dropout_rate}")


class StackedLinear(nnx.Module):
    """A linear layer per member: maps [... in] or [e ... in] to [e ... out]."""

    def __init__(self, members: int, inputs: int, outputs: int, init_scale: float, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(init_scale, "fan_in", "uniform", batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (members, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((members, outputs)))

    def shared(self, x: Float[Array, "n b i"]) -> Float[Array, "e n b o"]:
        """Apply every member to the same input, in one product with all kernels."""
        return jnp.einsum("nbi,eio->enbo", x, self.kernel[...]) + self.bias[...][:, None, None, :]

    def __call__(self, x: Float[Array, "e n b i"]) -> Float[Array, "e n b o"]:
        e, n, b, i = x.shape
        y = jnp.matmul(x.reshape(e, n * b, i), self.kernel[...]) + self.bias[...][:, None, :]
        return y.reshape(e, n, b, -1)


class StackedLayerNorm(nnx.Module):
    """Layer normalization with a scale and bias per member."""

    def __init__(self, members: int, width: int):
        self.scale = nnx.Param(jnp.ones((members, width)))
        self.bias = nnx.Param(jnp.zeros((members, width)))

    def __call__(self, x: Float[Array, "e n b w"]) -> Float[Array, "e n b w"]:
        mean = x.mean(axis=-1, keepdims=True)
        centred = x - mean
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
        return normed * self.scale[...][:, None, None, :] + self.bias[...][:, None, None, :]


class _ObservationNetworks(nnx.Module):
    """The layers that ``CriticNetworks`` and ``ValueNetwork`` share: per member an MLP from an observation to a number.

    An observation is given as the policy's pooled prefix features and the state. With ``chunk_dim``, the first layer
    reads a flat chunk besides.
    """

    def __init__(
        self,
        config: CriticConfig,
        *,
        members: int,
        feature_dim: int,
        state_dim: int,
        chunk_dim: int | None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        scale = config.kernel_init_scale
        self.use_features = config.use_pi0_features and feature_dim > 0
        fused_dim = state_dim
        if self.use_features:
            fused_dim = feature_dim + state_dim if config.feature_fusion_method == "concat" else feature_dim
            if config.feature_fusion_method == "add":
                self.state_projection = StackedLinear(members, state_dim, feature_dim, scale, rngs)
            if config.feature_fusion_method == "mlp":
                self.fusion = StackedLinear(members, feature_dim + state_dim, feature_dim, scale, rngs)
        widths = config.hidden_dims
        # The first layer has two parts, so that the observation's part is computed once for all candidates.
        self.observation_in = StackedLinear(members, fused_dim, widths[0], scale, rngs)
        if chunk_dim is not None:
            self.chunk_in = StackedLinear(members, chunk_dim, widths[0], scale, rngs)
        self.hidden = nnx.List([StackedLinear(members, a, b, scale, rngs) for a, b in itertools.pairwise(widths)])
        norms = [StackedLayerNorm(members, width) for width in widths] if config.use_layer_norm else []
        self.norms = nnx.List(norms)
        self.out = StackedLinear(members, widths[-1], 1, scale, rngs)

    def _observation_share(self, features: Float[Array, "b f"], state: Float[Array, "b s"]) -> Float[Array, "e 1 b w"]:
        """Return what the observation adds to the first layer, before its activation."""
        if not self.use_features:
            return self.observation_in.shared(state[None])
        both = jnp.concatenate([features, state], axis=-1)[None]
        if self.config.feature_fusion_method == "concat":
            return self.observation_in.shared(both)
        if self.config.feature_fusion_method == "add":
            return self.observation_in(features[None, None] + self.state_projection.shared(state[None]))
        return self.observation_in(_ACTIVATIONS[self.config.activation](self.fusion.shared(both)))

    def _after_first_layer(
        self, x: Float[Array, "e n b w"], dropout_rng: PRNGKeyArray | None = None
    ) -> Float[Array, "e n b"]:
        for index in range(len(self.config.hidden_dims)):
            if index > 0:
                x = self.hidden[index - 1](x)
            x = _ACTIVATIONS[self.config.activation](x)
            if self.config.use_layer_norm:
                x = self.norms[index](x)
            if dropout_rng is not None and self.config.dropout_rate > 0:
                x = _dropout(jax.random.fold_in(dropout_rng, index), x, self.config.dropout_rate)
        return self.out(x)[..., 0]


class CriticNetworks(_ObservationNetworks):
    """The critics: Q_e(observation, chunk) of every member, and their aggregate.

    The target ensemble is a second set of this module's parameters, which the agent holds.
    """

    def __init__(
        self,
        config: CriticConfig,
        *,
        feature_dim: int,
        state_dim: int,
        action_horizon: int,
        action_dim: int,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            members=config.num_critics,
            feature_dim=feature_dim,
            state_dim=state_dim,
            chunk_dim=action_horizon * action_dim,
            rngs=rngs,
        )
        self.action_dim = action_dim
        if config.q_aggregation == "weighted":
            self.aggregation_logits = nnx.Param(jnp.zeros((config.num_critics,)))

    @typed
    def __call__(
        self,
        features: Float[Array, "b f"],
        state: Float[Array, "b s"],
        chunks: Float[Array, "n b h a"],
        *,
        dropout_rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "e n b"]:
        """Return the values of n chunks per observation. ``dropout_rng`` switches dropout on, with a mask per member.

        Action dimensions beyond the robot's are the policy's padding and are not read.
        """
        n, b = chunks.shape[:2]
        flat = chunks[..., : self.action_dim].reshape(n, b, -1)
        return self._after_first_layer(
            self._observation_share(features, state) + self.chunk_in.shared(flat), dropout_rng
        )

    @typed
    def aggregate(self, q: Float[Array, "e *rest"], rng: PRNGKeyArray | None = None) -> Float[Array, "*rest"]:
        """Return one value from those of all members.

        ``subset`` takes the minimum of a random pair (REDQ, RLPD) if an ``rng`` is given, as for targets. Otherwise it
        takes the mean, as for ranking candidates, where a random pair would only add noise.
        """
        if self.config.q_aggregation == "min":
            return q.min(axis=0)
        if self.config.q_aggregation == "weighted":
            return jnp.tensordot(jax.nn.softmax(self.aggregation_logits[...]), q, axes=1)
        if self.config.q_aggregation == "subset" and rng is not None:
            pair = jax.random.choice(rng, self.config.num_critics, (2,), replace=False)
            return q[pair].min(axis=0)
        return q.mean(axis=0)


class ValueNetwork(_ObservationNetworks):
    """V(observation) of the implicit target: a single critic's layers without the chunk, and without dropout."""

    def __init__(self, config: CriticConfig, *, feature_dim: int, state_dim: int, rngs: nnx.Rngs):
        super().__init__(config, members=1, feature_dim=feature_dim, state_dim=state_dim, chunk_dim=None, rngs=rngs)

    @typed
    def __call__(self, features: Float[Array, "b f"], state: Float[Array, "b s"]) -> Float[Array, " b"]:
        return self._after_first_layer(self._observation_share(features, state))[0, 0]


def _dropout(rng: PRNGKeyArray, x: Float[Array, "e n b w"], rate: float) -> Float[Array, "e n b w"]:
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
