"""Flow matching: the loss and the sampler, against velocities one can integrate by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acrlpd.models import flow
from acrlpd.models.flow import FlowPolicy, Prefix


@dataclasses.dataclass
class Field:
    """A policy with a given velocity."""

    field: object
    action_dim: int = 2
    action_horizon: int = 3
    feature_dim: int = 0
    cache_batch_axis: int = 0

    def encode(self, observation):
        raise AssertionError("the prefix is given")

    def velocity(self, prefix, x_t, time):
        return self.field(prefix, x_t, time[..., None, None])

    @staticmethod
    def is_suffix_param(path):
        return True


@pytest.fixture(scope="module")
def prefix():
    return Prefix(state=jnp.array([[1.0], [2.0]]), features=jnp.zeros((2, 0)), mask=jnp.zeros((2, 0), bool), cache=None)


@pytest.fixture(scope="module")
def noise():
    return jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3, 2)), jnp.float32)


def test_field_is_a_flow_policy():
    assert isinstance(Field(None), FlowPolicy)


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_a_constant_velocity_is_followed_exactly(num_steps, prefix, noise):
    """Velocity is noise - actions: it is subtracted, once in all."""
    policy = Field(lambda prefix, x_t, time: jnp.full_like(x_t, 3.0))
    np.testing.assert_allclose(flow.sample(policy, prefix, noise, num_steps=num_steps), noise - 3, atol=1e-5)


def test_times_run_from_noise_to_data(prefix, noise):
    """Four steps read the field at 1, 3/4, 1/2, 1/4: the sum of t/4 is 5/8."""
    policy = Field(lambda prefix, x_t, time: jnp.broadcast_to(time, x_t.shape))
    np.testing.assert_allclose(flow.sample(policy, prefix, noise, num_steps=4), noise - 5 / 8, atol=1e-6)


def test_euler_steps_compound(prefix, noise):
    """dx/dt = x, backwards in two steps of a half: a factor 1/4; each row with its own state."""
    policy = Field(lambda prefix, x_t, time: x_t * prefix.state[None, :, :, None])
    factor = jnp.array([0.25, 0.0]).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(flow.sample(policy, prefix, noise, num_steps=2), noise * factor, atol=1e-6)


def test_remat_changes_nothing(prefix, noise):
    policy = Field(lambda prefix, x_t, time: jnp.sin(x_t) * time)

    def loss(noise, remat):
        return jnp.sum(flow.sample(policy, prefix, noise, num_steps=3, remat=remat) ** 2)

    kept, again = (jax.value_and_grad(loss)(noise, remat) for remat in (False, True))
    np.testing.assert_allclose(again[0], kept[0], rtol=1e-6)
    np.testing.assert_allclose(again[1], kept[1], rtol=1e-5)


def test_the_true_velocity_has_no_loss(prefix, noise):
    """x_t = t noise + (1 - t) actions, so noise - actions = (x_t - actions) / t."""
    actions, noise, time = noise[0], noise[1], jnp.array([0.3, 0.9])
    policy = Field(lambda prefix, x_t, time: (x_t - actions[None]) / time)
    np.testing.assert_allclose(flow.flow_loss(policy, prefix, actions, noise, time), jnp.zeros((2, 3)), atol=1e-9)


def test_flow_loss_by_hand(prefix):
    """Noise 1, actions -1: the target is 2. At t = 1/4 x_t is -1/2, at t = 1 it is 1. Mean over the action alone."""
    policy = Field(lambda prefix, x_t, time: x_t * jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2))
    loss = flow.flow_loss(policy, prefix, -jnp.ones((2, 3, 2)), jnp.ones((2, 3, 2)), jnp.array([0.25, 1.0]))
    np.testing.assert_allclose(loss, [[(2.5**2 + 4) / 2] * 3, [(1 + 4) / 2] * 3])


def test_sample_time_is_a_squeezed_beta():
    """Beta(1.5, 1) has the distribution function t**1.5 and the mean 0.6."""
    time = np.sort(flow.sample_time(jax.random.key(0, impl="rbg"), (20_000,)))
    assert time[0] >= flow.MIN_TIME
    assert time[-1] <= 1
    quantiles = np.linspace(0.05, 0.95, 19)
    expected = quantiles ** (1 / 1.5) * 0.999 + 0.001
    np.testing.assert_allclose(np.quantile(time, quantiles), expected, atol=0.01)
