"""The stacked ensemble against single networks in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models.critic import CriticConfig, CriticNetworks, ValueNetwork

E, N, B, F, S, H, A = 3, 5, 4, 6, 2, 3, 2
CONFIG = CriticConfig(num_critics=E, hidden_dims=(8, 7))


@pytest.fixture(scope="module")
def make(fill):
    """An ensemble with random parameters everywhere."""

    def made(feature_dim=F, steps=H, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        sizes = {"feature_dim": feature_dim, "state_dim": S, "horizon": steps, "action_dim": A}
        return fill(lambda: CriticNetworks(config, **sizes, rngs=nnx.Rngs(0)))

    return made


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = ((B, F), (B, S), (N, B, H, A))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
}


def member(critic, e, features, state, chunk=None):
    """Q of one member for one observation and one chunk: an ordinary MLP on concatenated inputs, in float64. Without a
    chunk, V of a value network."""

    def weights(layer):
        return np.float64(layer.kernel[...][e]), np.float64(layer.bias[...][e])

    def linear(layer, x):
        kernel, bias = weights(layer)
        return x @ kernel + bias

    config, observation = critic.config, np.concatenate([features, state])
    activation = ACTIVATIONS[config.activation]
    if not config.use_pi0_features:
        observation = state
    elif config.feature_fusion_method == "add":
        observation = features + linear(critic.state_projection, state)
    elif config.feature_fusion_method == "mlp":
        observation = activation(linear(critic.fusion, observation))
    first = [weights(critic.observation_in), *([] if chunk is None else [weights(critic.chunk_in)])]
    kernel, bias = np.concatenate([k for k, _ in first]), sum(b for _, b in first)
    x = np.concatenate([observation, [] if chunk is None else chunk.ravel()]) @ kernel + bias
    for layer in range(len(config.hidden_dims)):
        x = activation(x if layer == 0 else linear(critic.hidden[layer - 1], x))
        if config.use_layer_norm:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
            x = x * critic.norms[layer].scale[...][e] + critic.norms[layer].bias[...][e]
    return linear(critic.out, x)[0]


@pytest.mark.parametrize(
    "changes",
    [
        *({"feature_fusion_method": method} for method in ("concat", "add", "mlp")),
        {"use_pi0_features": False},
        {"use_layer_norm": False},
        {"hidden_dims": (8,), "feature_fusion_method": "mlp"},
        *({"activation": name} for name in ("relu", "swish", "tanh")),
    ],
    ids=str,
)
def test_equals_single_networks(changes, make, inputs):
    critic = make(**changes)
    q = critic(*inputs)
    assert q.shape == (E, N, B)
    features, state, chunks = (np.float64(x) for x in inputs)
    for e, n, b in np.ndindex(E, N, B):
        np.testing.assert_allclose(q[e, n, b], member(critic, e, features[b], state[b], chunks[n, b]), atol=1e-4)


def test_steps_beyond_the_horizon_have_no_value(make, inputs):
    features, state, chunks = inputs
    critic = make(steps=2)
    q = critic(*inputs)
    np.testing.assert_array_equal(critic(features, state, chunks.at[:, :, 2:].set(9.0)), q)
    np.testing.assert_array_equal(critic(features, state, chunks[:, :, :2]), q)
    assert np.abs(critic(features, state, chunks.at[:, :, 1:].set(9.0)) - q).min() > 0
    for e, n, b in np.ndindex(E, 1, B):
        expected = member(critic, e, *(np.float64(x) for x in (features[b], state[b], chunks[n, b, :2])))
        np.testing.assert_allclose(q[e, n, b], expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        *({"feature_fusion_method": method} for method in ("concat", "add", "mlp")),
        {"use_pi0_features": False, "dropout_rate": 0.5},
    ],
    ids=str,
)
def test_a_value_network_is_a_single_network_without_a_chunk(changes, fill, inputs):
    config = dataclasses.replace(CONFIG, **changes)
    value = fill(lambda: ValueNetwork(config, feature_dim=F, state_dim=S, rngs=nnx.Rngs(0)))
    features, state, _ = inputs
    expected = [member(value, 0, np.float64(features[b]), np.float64(state[b])) for b in range(B)]
    np.testing.assert_allclose(value(features, state), expected, atol=1e-4)


def test_fresh_members_differ(inputs):
    """Each has its own draw, of the same scale: uniform with variance 1 / fan-in."""
    config = dataclasses.replace(CONFIG, hidden_dims=(64, 64))
    critic = CriticNetworks(config, feature_dim=F, state_dim=S, horizon=H, action_dim=A, rngs=nnx.Rngs(0))
    q = critic(*inputs)
    assert np.abs(np.diff(q, axis=0)).min() > 0
    kernel = np.asarray(critic.hidden[0].kernel[...])
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), np.full(E, 64**-0.5), rtol=0.05)


def test_state_only_reads_no_features(make, inputs):
    features, state, chunks = inputs
    for critic in (make(use_pi0_features=False), make(feature_dim=0)):
        width = 0 if critic.config.use_pi0_features else F
        reference = critic(features[:, :width], state, chunks)
        np.testing.assert_array_equal(critic(features[:, :width] + 1, state, chunks), reference)
        assert np.abs(critic(features[:, :width], state + 1, chunks) - reference).min() > 0


def test_padded_action_dimensions_are_not_read(make, inputs):
    features, state, chunks = inputs
    critic = make()
    padded = jnp.concatenate([chunks, jnp.full((N, B, H, 3), 7.0)], axis=-1)
    np.testing.assert_array_equal(critic(features, state, padded), critic(features, state, chunks))


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_is_off_without_a_key(make, inputs):
    np.testing.assert_array_equal(make(dropout_rate=0.5)(*inputs), make()(*inputs))
    np.testing.assert_array_equal(make()(*inputs, dropout_rng=jax.random.key(0)), make()(*inputs))


def test_dropout_masks_differ_by_member(make, inputs):
    """Members with equal parameters disagree under dropout, and a key gives the same values twice."""
    critic = make(dropout_rate=0.5)
    graph, params = nnx.split(critic)
    equal = nnx.merge(graph, jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params))
    q = equal(*inputs)
    np.testing.assert_allclose(q, jnp.broadcast_to(q[:1], q.shape), atol=1e-5)
    dropped = equal(*inputs, dropout_rng=jax.random.key(0))
    assert np.abs(np.diff(dropped, axis=0)).min() > 0
    np.testing.assert_array_equal(equal(*inputs, dropout_rng=jax.random.key(0)), dropped)
    assert np.abs(equal(*inputs, dropout_rng=jax.random.key(1)) - dropped).max() > 0


def test_dropout_keeps_the_mean(make, inputs):
    """Linear behind its only layer, so the mean over many masks is the value without."""
    critic = make(dropout_rate=0.3, hidden_dims=(8,))
    keys = jax.random.split(jax.random.key(0), 4000)
    dropped = jax.vmap(lambda key: critic(*inputs, dropout_rng=key))(keys)
    error = np.abs(dropped.mean(axis=0) - critic(*inputs))
    np.testing.assert_array_less(error, 5 * dropped.std(axis=0) / np.sqrt(len(keys)))


# -- aggregation -------------------------------------------------------------------------------------------------------

Q = jnp.array([[1.0, 6.0], [2.0, 4.0], [6.0, 2.0]])  # three members, two observations


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("min", [1.0, 2.0]),
        ("mean", [3.0, 4.0]),
        ("subset", [3.0, 4.0]),
        ("mean_minus_std", [3 - 0.5 * (14 / 3) ** 0.5, 4 - 0.5 * (8 / 3) ** 0.5]),
    ],
)
def test_aggregate(method, expected, make):
    """Without a key a subset is the mean."""
    np.testing.assert_allclose(make(q_aggregation=method).aggregate(Q), expected, rtol=1e-6)


@pytest.mark.parametrize("pessimism", [0.0, 2.0])
def test_members_that_agree_have_their_value_and_finite_gradients(pessimism, make):
    critic = make(q_aggregation="mean_minus_std", pessimism=pessimism)
    value, gradient = jax.value_and_grad(lambda q: critic.aggregate(q)[0])(jnp.full((3, 1), 7.0))
    np.testing.assert_allclose(value, 7.0, atol=1e-5)
    np.testing.assert_allclose(gradient, jnp.full((3, 1), 1 / 3), rtol=1e-6)


def test_weighted(make):
    """Softmax weights 1/2, 1/4, 1/4; equal ones in a fresh network."""
    critic = make(q_aggregation="weighted")
    critic.aggregation_logits[...] = jnp.log(jnp.array([2.0, 1.0, 1.0]))
    np.testing.assert_allclose(critic.aggregate(Q), [2.5, 4.5], rtol=1e-6)
    sizes = {"feature_dim": F, "state_dim": S, "horizon": H, "action_dim": A}
    fresh = CriticNetworks(dataclasses.replace(CONFIG, q_aggregation="weighted"), **sizes, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(fresh.aggregate(Q), [3.0, 4.0], rtol=1e-6)


def test_subset_is_the_minimum_of_a_random_pair(make):
    """Every pair of different members occurs, one for the whole batch at a time."""
    critic = make(q_aggregation="subset")
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = {tuple(row) for row in jax.vmap(lambda key: critic.aggregate(Q, key))(keys).tolist()}
    assert drawn == {(1.0, 4.0), (1.0, 2.0), (2.0, 2.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_critics": 0}, "num_critics"),
        ({"num_critics": 1, "q_aggregation": "subset"}, "there must be 2"),
        ({"num_critics": 1, "q_aggregation": "mean_minus_std"}, "there must be 2"),
        ({"pessimism": -0.1}, "pessimism"),
        ({"horizon": 0}, "horizon must be"),
        ({"hidden_dims": ()}, "hidden_dims must be a non-empty list"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"q_aggregation": "max"}, "q_aggregation must be 'min', .* or 'mean_minus_std', got 'max'"),
        ({"activation": "elu"}, "activation must be 'relu', .* got 'elu': did you mean 'relu'"),
        ({"feature_fusion_method": "sum"}, "feature_fusion_method must be 'concat', 'add' or 'mlp'"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**changes)
