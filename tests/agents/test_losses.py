"""Each equation with a few numbers and the expected result."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from acrlpd.agents import acrlpd, losses


@pytest.mark.parametrize(
    ("valid", "bootstrap_mask", "expected"),
    [
        ([1.0, 1.0, 1.0], 1.0, 1 + 0.5 + 0.25 + 0.125 * 8),  # the whole chunk lies inside the episode
        ([1.0, 1.0, 1.0], 0.0, 1 + 0.5 + 0.25),  # the episode terminates at the last step
        ([1.0, 1.0, 0.0], 0.0, 1 + 0.5),  # it terminates one step earlier
        ([1.0, 0.0, 0.0], 0.0, 1),  # at the first step
    ],
)
def test_td_target(valid, bootstrap_mask, expected):
    target = losses.td_target(
        rewards=jnp.ones((1, 3)),
        valid=jnp.array([valid]),
        bootstrap_mask=jnp.array([bootstrap_mask]),
        next_q=jnp.array([8.0]),
        discount=0.5,
    )
    np.testing.assert_allclose(target, [expected])


def test_td_target_keeps_rows_apart():
    target = losses.td_target(
        rewards=jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        valid=jnp.array([[1.0, 1.0], [1.0, 0.0]]),
        bootstrap_mask=jnp.array([1.0, 0.0]),
        next_q=jnp.array([16.0, 100.0]),
        discount=0.25,
    )
    np.testing.assert_allclose(target, [1 + 0.5 + 1, 3])


@pytest.mark.parametrize(
    ("sequence_mask", "expected"),
    [
        ([1.0, 1.0], (1 + 9 + 4 + 0) / 4),
        ([1.0, 0.0], (1 + 4) / 4),  # divided by the whole batch, as in QC
        ([0.0, 0.0], 0.0),
    ],
)
def test_critic_loss(sequence_mask, expected):
    """Errors 1, -3 of the first member and 2, 0 of the second."""
    q = jnp.array([[6.0, 4.0], [7.0, 7.0]])
    loss = losses.critic_loss(q, jnp.array([5.0, 7.0]), jnp.array(sequence_mask))
    np.testing.assert_allclose(loss, expected)


@pytest.mark.parametrize(
    ("statistic", "sequence_mask", "expected"),
    [
        ("expectile", [1.0, 1.0, 1.0], (0.9 * 4 + 0.1 * 9 + 0) / 3),
        ("quantile", [1.0, 1.0, 1.0], (0.9 * 2 + 0.1 * 3 + 0) / 3),
        ("expectile", [1.0, 0.0, 1.0], 0.9 * 4 / 3),  # divided by the whole batch
        ("quantile", [0.0, 1.0, 1.0], 0.1 * 3 / 3),
    ],
)
def test_implicit_value_loss(statistic, sequence_mask, expected):
    """Q lies 2 above V, 3 below it, and on it."""
    v, q = jnp.array([1.0, 1.0, 1.0]), jnp.array([3.0, -2.0, 1.0])
    loss = losses.implicit_value_loss(v, q, jnp.array(sequence_mask), statistic=statistic, level=0.9)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert loss == pytest.approx(reference.implicit_loss(v, q, np.array(sequence_mask), statistic, 0.9))


@pytest.fixture(scope="module")
def qgf(shared):
    """Arrays of QGF's own code: one batch, its critics' and V's values, and its losses."""
    path = shared / "golden-improvement" / "qgf.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path) as arrays:
        return {name: jnp.asarray(array) for name, array in arrays.items()}


def test_qgfs_critic_loss(qgf):
    target = losses.td_target(
        qgf["rewards"],
        jnp.ones_like(qgf["rewards"]),
        qgf["bootstrap_mask"],
        qgf["next_v"],
        discount=float(qgf["discount"]),
    )
    loss = losses.critic_loss(qgf["q"], target, qgf["sequence_mask"])
    np.testing.assert_allclose(loss, qgf["critic_loss"], rtol=1e-5)


def test_qgfs_value_loss(qgf):
    q, level = qgf["target_q"].min(axis=0), float(qgf["expectile"])
    loss = losses.implicit_value_loss(qgf["v"], q, qgf["sequence_mask"], statistic="expectile", level=level)
    np.testing.assert_allclose(loss, qgf["value_loss"], rtol=1e-5)


@pytest.mark.parametrize(("error", "expected"), [(0.5, 0.25), (-1.0, 1.0), (3.0, 2 * 3 - 1), (-3.0, 2 * 3 - 1)])
def test_huber(error, expected):
    """The square up to delta, there a line with its slope."""
    loss = losses.critic_loss(jnp.array([[error]]), jnp.zeros(1), jnp.ones(1), huber_delta=1.0)
    np.testing.assert_allclose(loss, expected)


def test_huber_has_the_slope_of_the_square_at_most():
    def slope(error):
        return jax.grad(lambda x: losses.critic_loss(x.reshape(1, 1), jnp.zeros(1), jnp.ones(1), huber_delta=2.0))(
            jnp.float32(error)
        )

    np.testing.assert_allclose([slope(1.0), slope(5.0), slope(-5.0)], [2.0, 4.0, -4.0])


def test_bc_loss():
    """Steps that are not real count as zero and in the mean."""
    loss = losses.bc_loss(
        jnp.array([[1.0, 2.0], [3.0, 100.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.array([2.0, 1.0])
    )
    np.testing.assert_allclose(loss, (2 * 1 + 2 * 2 + 3) / 4)


def test_bounded_weights_by_hand():
    """Scores -1 and 1 are their own standard scores; exp(2) lies inside a bound of 64, outside one of 4."""
    score = jnp.array([-1.0, 1.0])
    inside = np.exp([-1.0, 1.0]) / np.cosh(1.0)
    np.testing.assert_allclose(losses.bounded_weights(score, temperature=1.0, bound=64.0), inside, rtol=1e-5)
    np.testing.assert_allclose(losses.bounded_weights(score, temperature=1.0, bound=4.0), [0.4, 1.6], rtol=1e-5)
    np.testing.assert_allclose(losses.bounded_weights(score, temperature=1e6, bound=4.0), [1.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("bound", [1.0, 2.0, 10.0])
def test_bounded_weights_keep_their_bound(bound):
    score = jnp.asarray(np.random.default_rng(0).standard_cauchy(100), jnp.float32)
    weights = losses.bounded_weights(score, temperature=0.1, bound=bound)
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights.max() / weights.min(), bound, rtol=1e-5)
    in_order = weights[jnp.argsort(score)]
    assert (jnp.diff(in_order) >= 0).all()


def test_bounded_weights_of_equal_scores():
    np.testing.assert_allclose(losses.bounded_weights(jnp.full(3, 7.0), temperature=1.0, bound=4.0), jnp.ones(3))


def test_bounded_weights_are_constants():
    grad = jax.grad(lambda x: losses.bounded_weights(x, temperature=1.0, bound=4.0)[0])(jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(grad, jnp.zeros(3))


def test_difficulty_ignores_padding():
    """The second chunk is imitated better where it is real: what a network says about padding is no difficulty."""
    config = acrlpd.AgentConfig(bc_weighting="difficulty")
    flow_loss, valid = jnp.array([[2.0, 2.0], [1.0, 9.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    weights = acrlpd._bc_sample_weights(config, flow_loss, valid, jnp.zeros((2, 2)), jnp.zeros(2))
    assert weights[0] > 1 > weights[1]


def test_importance_prefers_what_was_better_than_thought():
    config = acrlpd.AgentConfig(bc_weighting="importance")
    q = jnp.array([[1.0, 1.0], [3.0, 3.0]])
    weights = acrlpd._bc_sample_weights(config, jnp.zeros((2, 2)), jnp.ones((2, 2)), q, jnp.array([5.0, 1.0]))
    np.testing.assert_allclose(weights, [1.6, 0.4], rtol=1e-5)  # target - mean Q is 3 and -1: a bound of 4
    off = dataclasses.replace(config, bc_weighting="none")
    np.testing.assert_array_equal(
        acrlpd._bc_sample_weights(off, jnp.zeros((2, 2)), jnp.ones((2, 2)), q, jnp.array([5.0, 1.0])), [1.0, 1.0]
    )


def test_q_gradient_normaliser_has_no_gradient():
    """-mean(Q) / mean|Q| of 3 and -1 is -1/2, and each Q's slope -1/2 over that size of 2."""
    q = jnp.array([[3.0, -1.0]])
    np.testing.assert_allclose(losses.q_gradient_loss(q), -0.5, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(losses.q_gradient_loss)(q), [[-0.25, -0.25]], rtol=1e-5)


def test_distill_loss_moves_the_student_alone():
    student, teacher = jnp.array([[[1.0, 2.0]]]), jnp.array([[[0.0, 4.0]]])
    np.testing.assert_allclose(losses.distill_loss(student, teacher), (1 + 4) / 2)
    to_student, to_teacher = jax.grad(losses.distill_loss, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(to_student, [[[1.0, -2.0]]])
    np.testing.assert_array_equal(to_teacher, jnp.zeros((1, 1, 2)))


def test_entropy_by_hand():
    """Candidates at -1 and 1 have variance 1: log(2 pi e) / 2 for each dimension. At +-3: log 3 more."""
    candidates = jnp.array([[[[1.0, 1.0], [1.0, 3.0]]], [[[-1.0, -1.0], [-1.0, -3.0]]]])
    expected = 4 * 0.5 * np.log(2 * np.pi * np.e) + np.log(3)
    np.testing.assert_allclose(losses.gaussian_entropy(candidates), [expected], rtol=1e-5)


def test_entropy_of_a_gaussian():
    """Two observations with different spread, from many samples."""
    scale = np.array([0.5, 2.0])
    samples = np.random.default_rng(0).normal(size=(20_000, 2, 3, 1)) * scale[:, None, None] + 5.0
    expected = 3 * (0.5 * np.log(2 * np.pi * np.e) + np.log(scale))
    np.testing.assert_allclose(losses.gaussian_entropy(jnp.asarray(samples, jnp.float32)), expected, atol=0.05)


def test_entropy_of_equal_candidates_is_finite():
    entropy, slope = jax.value_and_grad(lambda x: losses.gaussian_entropy(x).sum())(jnp.ones((2, 1, 1, 1)))
    np.testing.assert_allclose(entropy, 0.5 * np.log(2 * np.pi * np.e * 1e-6), rtol=1e-5)
    np.testing.assert_array_equal(slope, jnp.zeros((2, 1, 1, 1)))


@pytest.mark.parametrize(("entropy", "expected"), [([3.0, 5.0], 2 * 3.0), ([-1.0, 1.0], 2 * -1.0)])
def test_temperature_loss(entropy, expected):
    """alpha = 2, target 1. Its slope in log alpha is itself: alpha falls where there is too much entropy."""
    log_temperature, entropy = jnp.log(jnp.float32(2.0)), jnp.array(entropy)

    def loss(log_temperature, entropy):
        return losses.temperature_loss(log_temperature, entropy, target_entropy=1.0)

    value, (slope, to_entropy) = jax.value_and_grad(loss, argnums=(0, 1))(log_temperature, entropy)
    np.testing.assert_allclose([value, slope], [expected, expected], rtol=1e-6)
    np.testing.assert_array_equal(to_entropy, jnp.zeros(2))


def test_an_average_spans_the_last_sixth_of_the_updates_until_it_spans_its_own_length():
    """What it began with is forgotten at once, and weights grow as the fifth power of the step."""
    shares = np.array([losses.averaging_share(jnp.int32(step), decay=0.999) for step in range(600)])
    weights = shares * np.append(np.cumprod((1 - shares)[::-1])[-2::-1], 1.0)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    assert weights[0] < 1e-10
    assert 0.64 < weights[-100:].sum() < 0.68
    np.testing.assert_allclose(weights[599] / weights[299], 2.0**5, rtol=0.05)
    assert losses.averaging_share(jnp.int32(10_000), decay=0.999) == np.float32(1 - 0.999)
