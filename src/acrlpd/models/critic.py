"""The critic ensemble: Q of a chunk's first steps, with all members in one stacked network; and V of an observation.

The leading axis of every parameter is the member, so ten critics are one batched matrix product per layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd import fields
from acrlpd.fields import NOT_EMPTY, Interval, NonNegativeFloat, PositiveInt
from acrlpd.types import typed

Activation = Literal["relu", "swish", "gelu", "tanh"]
QAggregation = Literal["min", "mean", "weighted", "subset", "mean_minus_std"]
_NEEDS_TWO = ("subset", "mean_minus_std")
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

    num_critics: PositiveInt = 10  # members of the ensemble
    hidden_dims: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (256, 256)  # width of each hidden layer
    activation: Activation = "gelu"
    use_layer_norm: bool = True  # normalize each hidden layer, as QC and RLPD do
    dropout_rate: Annotated[float, Interval("[0, 1)")] = 0.0  # off in targets and while acting
    kernel_init_scale: Annotated[float, Interval("(0, inf]")] = 1.0  # variance scaling, fan-in, uniform
    q_aggregation: QAggregation = "min"  # of the members' Q to one value; subset: min of two drawn members (RLPD)
    # mean_minus_std: standard deviations below the mean (rho of QAM, arXiv:2601.14234)
    pessimism: NonNegativeFloat = 0.5
    use_pi0_features: bool = True  # read the policy's pooled prefix tokens and the state; False: only the state
    feature_fusion_method: FeatureFusion = "concat"  # how the policy's features and the state come together
    # first steps of a chunk that are judged; None: in a run those that are executed, else all
    horizon: PositiveInt | None = None
    # steps that a second, long ensemble judges, on which the TD target is computed. The critics that choose then learn
    # from it (DQC, arXiv:2512.10926). None: there is none. It needs target="implicit"
    backup_horizon: PositiveInt | None = None
    # weight of an error where the long critics are above the short ones, which is 1 - this where they are below
    distill_level: Annotated[float, Interval("(0, 1)")] = 0.8

    def __post_init__(self):
        fields.check(self)
        if self.q_aggregation in _NEEDS_TWO and self.num_critics < 2:
            raise ValueError(
                f"critic.num_critics is {self.num_critics}: there must be 2 for q_aggregation="
                + " or ".join(map(repr, _NEEDS_TWO))
            )


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

    The target ensemble is a second set of this module's parameters, which the agent holds. ``horizon`` and
    ``action_dim`` are the steps and action dimensions that are read of a chunk, see ``judged``.
    """

    def __init__(
        self,
        config: CriticConfig,
        *,
        feature_dim: int,
        state_dim: int,
        horizon: int,
        action_dim: int,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            members=config.num_critics,
            feature_dim=feature_dim,
            state_dim=state_dim,
            chunk_dim=horizon * action_dim,
            rngs=rngs,
        )
        self.horizon = horizon
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

        Only the ``judged`` part of a chunk is read.
        """
        n, b = chunks.shape[:2]
        flat = self.judged(chunks).reshape(n, b, -1)
        return self._after_first_layer(
            self._observation_share(features, state) + self.chunk_in.shared(flat), dropout_rng
        )

    def judged(self, chunks: Float[Array, "*lead h a"]) -> Float[Array, "*lead steps dims"]:
        """Return the part of chunks that has a value: the steps up to the horizon, in the robot's action dimensions.

        Later steps are predicted but not executed, and further dimensions are the policy's padding.
        """
        return chunks[..., : self.horizon, : self.action_dim]

    @typed
    def aggregate(self, q: Float[Array, "e *rest"], rng: PRNGKeyArray | None = None) -> Float[Array, "*rest"]:
        """Return one value from those of all members.

        ``mean_minus_std`` subtracts ``pessimism`` standard deviations of the members from their mean.
        ``subset`` takes the minimum of a random pair (REDQ, RLPD) if an ``rng`` is given, as for targets. Otherwise it
        takes the mean, as for ranking candidates, where a random pair would only add noise.
        """
        if self.config.q_aggregation == "min":
            return q.min(axis=0)
        if self.config.q_aggregation == "mean_minus_std":
            # the floor gives the standard deviation of equal members a gradient, which is zero
            return q.mean(axis=0) - self.config.pessimism * jnp.sqrt(jnp.maximum(q.var(axis=0), 1e-12))
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
