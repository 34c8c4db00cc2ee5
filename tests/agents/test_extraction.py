"""What each extraction proposes and trains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from acrlpd.agents import extraction, losses
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.extraction import BestOfN, Distill, QGradient
from acrlpd.models import flow

HALF = 0.5


@pytest.fixture(scope="module")
def agent(toys):
    return toys.agent(toys.config(extraction="distill"))


@pytest.fixture(scope="module")
def modules(agent):
    return agent.nets.modules(agent.params, agent.frozen)


@pytest.fixture(scope="module")
def prefix(modules, toys):
    return modules.policy.encode(toys.batch().observations)


@pytest.fixture(scope="module")
def noise(toys):
    return jax.random.normal(toys.key(0), (4, 6, 3, 2))


@pytest.mark.parametrize("make", [BestOfN, QGradient])
def test_flow_candidates_are_the_flows(make, modules, prefix, noise):
    chunks = flow.sample(modules.policy, prefix, noise, num_steps=3)
    np.testing.assert_allclose(make(3, None).propose(modules, prefix, noise), chunks, atol=1e-6)
    clipped = make(3, HALF).propose(modules, prefix, noise)
    assert jnp.abs(chunks).max() > HALF
    np.testing.assert_allclose(clipped, np.clip(chunks, -HALF, HALF), atol=1e-6)


def test_student_candidates_are_single_steps(modules, prefix, noise):
    """From time 1 to 0 at once: noise - velocity. Its parameters are not the policy's."""
    time = jnp.ones(noise.shape[:2])
    step = noise - modules.student.velocity(prefix, noise, time)
    np.testing.assert_allclose(Distill(3, None, 1.0).propose(modules, prefix, noise), step, atol=1e-6)
    assert jnp.abs(step - (noise - modules.policy.velocity(prefix, noise, time))).max() > 0.1


def test_a_fresh_student_is_the_flows_own_single_step(toys, noise):
    agent = ACRLPDAgent.create(
        toys.config(extraction="distill"),
        toys.policy(),
        dict.fromkeys(("policy", "critic", "temperature"), optax.sgd(1.0)),
        state_dim=4,
        rng=toys.key(0),
    )
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(toys.batch().observations)
    expected = flow.sample(modules.policy, prefix, noise, num_steps=1)
    np.testing.assert_allclose(extraction.one_step(modules.student, prefix, noise), expected, atol=1e-6)


def test_student_is_asked_for_by_name(modules, prefix, noise):
    without = dataclasses.replace(modules, student=None)
    with pytest.raises(ValueError, match="no student"):
        Distill(3, None, 1.0).propose(without, prefix, noise)


def test_best_of_n_trains_nothing(modules, prefix, noise):
    loss, metrics = BestOfN(3, None).actor_loss(modules, prefix, noise, jnp.ones(()))
    assert (loss, metrics) == (0, {})


def test_q_gradient_is_q_and_the_entropy_bonus(modules, prefix, noise):
    """Without a second sample there is no spread, and no bonus; with one, alpha weighs it."""
    climb = QGradient(3, None)
    single, _ = climb.actor_loss(modules, prefix, noise[:1], jnp.float32(2.0))
    chunks = flow.sample(modules.policy, prefix, noise[:1], num_steps=3)
    q = modules.critic.aggregate(modules.critic(prefix.features, prefix.state, chunks))
    np.testing.assert_allclose(single, losses.q_gradient_loss(q), rtol=1e-5)

    cold, _ = climb.actor_loss(modules, prefix, noise[:2], jnp.float32(0.0))
    warm, _ = climb.actor_loss(modules, prefix, noise[:2], jnp.float32(2.0))
    chunks = flow.sample(modules.policy, prefix, noise[:2], num_steps=3)
    np.testing.assert_allclose(cold - warm, 2 * losses.gaussian_entropy(chunks).mean(), rtol=1e-4)


def test_entropy_bonus_leaves_padding_alone(toys):
    """The third of three action dimensions is the model's padding: its spread earns nothing."""
    agent = toys.agent(toys.config(extraction="q_gradient"), policy=toys.policy(3), action_dim=2)
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(toys.batch().observations)
    noise = jax.random.normal(toys.key(0), (2, 6, 3, 3))
    cold, warm = (QGradient(1, None).actor_loss(modules, prefix, noise, jnp.float32(t))[0] for t in (0, 1))
    chunks = flow.sample(modules.policy, prefix, noise, num_steps=1)
    np.testing.assert_allclose(cold - warm, losses.gaussian_entropy(chunks[..., :2]).mean(), rtol=1e-4)


def test_clip():
    chunks = jnp.array([-2.0, -0.5, 0.5, 2.0]).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(extraction.clip(chunks, 1.0).ravel(), [-1.0, -0.5, 0.5, 1.0])
    assert extraction.clip(chunks, None) is chunks
