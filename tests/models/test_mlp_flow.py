"""The flow MLP against an ordinary MLP on the concatenated inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models.flow import FlowPolicy
from acrlpd.models.mlp_flow import MLPFlow, MLPFlowConfig
from acrlpd.types import Observation

CONFIG = MLPFlowConfig(state_dim=4, action_dim=2, action_horizon=3, hidden_dims=(8, 6, 5))


@pytest.fixture(scope="module")
def policy(fill):
    return fill(lambda: CONFIG.create(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    state, x_t, time = rng.normal(size=(5, 4)), rng.normal(size=(7, 5, 3, 2)), rng.uniform(size=(7, 5))
    return state.astype(np.float32), x_t.astype(np.float32), time.astype(np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_is_a_flow_policy(policy):
    assert isinstance(policy, FlowPolicy)
    assert (policy.action_dim, policy.action_horizon, policy.feature_dim) == (2, 3, 0)


def test_velocity_equals_numpy(policy, inputs):
    """State, chunk row by row, time; one candidate and one observation at a time."""
    state, x_t, time = inputs
    velocity = policy.velocity(policy.encode(Observation(state=jnp.asarray(state))), x_t, time)
    kernel = np.concatenate([policy.state_in.kernel[...], policy.chunk_time_in.kernel[...]])
    bias = policy.state_in.bias[...] + policy.chunk_time_in.bias[...]
    for n, b in np.ndindex(7, 5):
        x = gelu(np.concatenate([state[b], x_t[n, b].ravel(), [time[n, b]]]) @ kernel + bias)
        for layer in policy.hidden:
            x = gelu(x @ layer.kernel[...] + layer.bias[...])
        x = x @ policy.out.kernel[...] + policy.out.bias[...]
        np.testing.assert_allclose(velocity[n, b], x.reshape(3, 2), atol=1e-5)


def test_prefix(policy, inputs):
    """The state's share of the first layer, once per observation; no features, no tokens."""
    prefix = policy.encode(Observation(state=jnp.asarray(inputs[0])))
    assert prefix.cache.shape == (5, 8)
    assert prefix.features.shape == prefix.mask.shape == (5, 0)
    np.testing.assert_array_equal(prefix.state, inputs[0])


def test_is_suffix_param_says_what_velocity_reads(policy, inputs):
    """``encode`` depends on exactly the other parameters."""
    graph, params = nnx.split(policy)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}

    def read(function):
        grads = jax.jit(jax.grad(lambda params: jnp.sum(function(nnx.merge(graph, params)) ** 2)))(params)
        return {"/".join(map(str, path)) for path, grad in nnx.to_flat_state(grads) if np.any(grad[...])}

    state, x_t, time = inputs
    observation = Observation(state=jnp.asarray(state))
    prefix = policy.encode(observation)
    suffix = {path for path in paths if MLPFlow.is_suffix_param(path)}
    assert read(lambda policy: policy.velocity(prefix, x_t, time)) == suffix
    assert read(lambda policy: policy.encode(observation).cache) == paths - suffix


def test_widths(policy):
    assert [layer.kernel.shape for layer in policy.hidden] == [(8, 6), (6, 5)]
    single = MLPFlowConfig(state_dim=1, action_dim=1, action_horizon=1, hidden_dims=(2,)).create(nnx.Rngs(0))
    assert list(single.hidden) == []


@pytest.mark.parametrize("hidden_dims", [(), (8, 0)])
def test_refuses_empty_widths(hidden_dims):
    with pytest.raises(ValueError, match="hidden_dims"):
        MLPFlowConfig(state_dim=1, action_dim=1, hidden_dims=hidden_dims)
