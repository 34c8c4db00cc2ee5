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


# -- guidance by the gradient of a value -------------------------------------------------------------------------------


def test_guided_steps_are_those_of_qgfs_authors(shared):
    """Every step of a sample that their code drew with the weight 1: the clean chunk, and where the step ends."""
    file = shared / "golden-improvement" / "qgf.npz"
    if not file.exists():
        pytest.skip(f"{file} is not in this set of reference files")
    with np.load(file) as arrays:
        golden = dict(arrays)
    steps, b = golden["trace/t"].shape
    x = golden["noise"][None]
    for k in range(steps):
        v, g, seen = golden["trace/v"][k][None], golden["trace/g"][k][None], []
        climb = flow.Climb(lambda clean, g=g, seen=seen: seen.append(clean) or jnp.asarray(g), jnp.ones((1, b)), 1.0)
        np.testing.assert_allclose(x[0], golden["trace/x"][k], atol=1e-5)
        velocity = flow.guided_velocity(jnp.asarray(v), jnp.asarray(x), jnp.asarray(golden["trace/t"][k][None]), climb)
        np.testing.assert_allclose(seen[0][0], golden["trace/a_hat"][k], atol=1e-5)
        x = x - np.asarray(velocity) / steps
        np.testing.assert_allclose(x[0], golden["trace/x_next"][k], atol=1e-5)
    np.testing.assert_allclose(np.clip(x[0], -1, 1), golden["guided/1.0/sample"], atol=1e-5)
    for variant in ("noisy", "jacobian"):
        assert np.abs(golden[f"{variant}/1.0/sample"] - golden["guided/1.0/sample"]).max() > 1e-3


CENTRES = np.array([0.9, -0.4])  # of two critics, whose smaller value counts


def value_and_gradient(a):
    """The smaller of two parabolas of every entry, summed, and its gradient, in NumPy."""
    each = np.stack([-((a - centre) ** 2).sum(axis=(-2, -1)) for centre in CENTRES])
    centre = CENTRES[each.argmin(axis=0)][..., None, None]
    return each.min(axis=0), -2 * (a - centre)


def climbed(x, weights, num_steps, variant):
    """The sampler in NumPy for the velocity sin(2 x) t, whose derivative by x is 2 cos(2 x) t."""
    for k in range(num_steps):
        t = 1 - k / num_steps
        v, slope = np.sin(2 * x) * t, 2 * np.cos(2 * x) * t
        clean = np.clip(x - t * v, -1, 1)
        g = value_and_gradient(x if variant == "noisy" else clean)[1]
        if variant == "jacobian":
            g = g * (1 - t * slope) * (np.abs(x - t * v) < 1)
        x = x - (v - weights[:, None, None, None] * g) / num_steps
    return x


def test_guided_samples_equal_numpy_and_no_other_variant(prefix, noise):
    policy = Field(lambda prefix, x_t, time: jnp.sin(2 * x_t) * time)
    weights = np.array([0.0, 0.1, 0.3, 1.0, 2.0], np.float32)

    def value(a):
        return jnp.stack([-((a - centre) ** 2).sum(axis=(-2, -1)) for centre in CENTRES]).min(axis=0).sum()

    climbing = flow.climbing(policy, flow.Climb(jax.grad(value), jnp.asarray(weights)[:, None], 1.0))
    samples = flow.sample(climbing, prefix, noise, num_steps=4)
    z = np.asarray(noise, np.float64)
    np.testing.assert_allclose(samples, climbed(z, weights, 4, "guided"), atol=1e-5)
    for variant in ("noisy", "jacobian"):
        assert np.abs(samples - climbed(z, weights, 4, variant))[3:].max() > 1e-2, variant
    np.testing.assert_array_equal(samples[0], flow.sample(policy, prefix, noise, num_steps=4)[0])


def test_nothing_is_differentiated_through_the_guidance(prefix, noise):
    """The derivative of a guided velocity by the chunk is that of the policy's own."""
    policy = Field(lambda prefix, x_t, time: jnp.sin(x_t))
    climbing = flow.climbing(policy, flow.Climb(lambda a: a**3, jnp.ones((1, 1))))
    time = jnp.full(noise.shape[:2], 0.5)
    slope = jax.grad(lambda x: climbing.velocity(prefix, x, time).sum())(noise)
    np.testing.assert_allclose(slope, np.cos(noise), atol=1e-6)


def test_a_chunk_that_climbs_goes_on_continuing_another(prefix, noise):
    """By hand for the velocity x: climbing where steps are free, then the pull, whose Jacobian is 1 - t."""
    policy = Field(lambda prefix, x_t, time: x_t)
    guidance = flow.Guidance(jnp.ones((2, 3, 2)), jnp.array([[1.0, 0.5, 0.0]] * 2))
    both = flow.climbing(flow.Guided(policy, guidance), flow.Climb(lambda a: 2 * a, jnp.full((1, 1), 0.3)))
    x, t = np.asarray(noise), 0.5
    agree = np.array([1.0, 0.5, 0.0])[:, None]
    climbing = x - (1 - agree) * 0.3 * 2 * (x - t * x)
    pull = (1 - (x - t * climbing)) * agree * (1 - t)
    velocity = both.velocity(prefix, noise, jnp.full(noise.shape[:2], t))
    np.testing.assert_allclose(velocity, climbing - 2 * pull, atol=1e-5)  # (t^2 + (1 - t)^2) / (t (1 - t)) is 2
