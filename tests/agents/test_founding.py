"""The founding design's names do what the agent does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import acrlpd
from acrlpd.agents import losses
from acrlpd.models import flow
from acrlpd.models.critic import CriticConfig


@pytest.fixture(scope="module")
def agent(toys):
    return toys.agent()


def test_loss_computers_are_terms_of_the_update(agent, toys):
    batch, rng = toys.batch(), toys.key(0)
    computers = acrlpd.JointLossComputer(), acrlpd.CriticLossComputer(), acrlpd.BCLossComputer()
    (joint, metrics), (critic, _), (bc, _) = toys.jit(lambda agent: [each(agent, batch, rng) for each in computers])(
        agent
    )
    _, expected = toys.update(agent, batch, rng, acrlpd.DEFAULT_LOSS_WEIGHTS)
    for value, name in ((joint, "total_loss"), (critic, "critic_loss"), (bc, "bc_loss"), (metrics["q_mean"], "q_mean")):
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_a_train_state_carries_an_agent_over(agent, toys):
    pi0_agent = acrlpd.ACRLPDPi0Agent(**{field.name: getattr(agent, field.name) for field in dataclasses.fields(agent)})
    trained = dataclasses.replace(pi0_agent, params=jax.tree.map(lambda x: x + 1, pi0_agent.params))
    back = pi0_agent.update_from_train_state(trained.create_train_state())
    jax.tree.map(np.testing.assert_array_equal, back, trained)
    assert isinstance(back, acrlpd.ACRLPDPi0Agent)


def test_soft_update(agent):
    moved = acrlpd.soft_update_target_networks(agent, tau=0.25)
    expected = jax.tree.map(lambda new, slow: 0.25 * new + 0.75 * slow, agent.params["critic"], agent.target_critic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved.target_critic, expected)


def test_temperature_and_entropy(agent, toys):
    temperature = acrlpd.TemperatureModule(0.5)
    np.testing.assert_allclose(temperature(), 0.5)
    np.testing.assert_allclose(temperature.alpha_loss(jnp.array([1.0, 3.0]), -1.0), 0.5 * (2 + 1))
    policy, observations = agent.acting_modules().policy, toys.batch().observations
    noise = jax.random.normal(toys.key(1), (4, 6, 3, 2))
    chunks = flow.sample(policy, policy.encode(observations), noise, num_steps=5)
    np.testing.assert_allclose(
        acrlpd.EntropyEstimator(num_samples=4).estimate_entropy(policy, observations, toys.key(1)),
        losses.gaussian_entropy(chunks),
        rtol=1e-5,
    )


def test_one_critic_on_what_the_encoder_gives(agent, toys):
    config = CriticConfig(hidden_dims=(8,))
    observations = toys.batch().observations
    encoded = acrlpd.create_observation_encoder(agent.acting_modules().policy, config)(observations)
    np.testing.assert_array_equal(encoded, observations.state)  # a flow MLP has no features beside the state
    critic = acrlpd.SingleCriticNetwork(config, 4, 6, nnx.Rngs(params=toys.key(0)))
    values = critic(encoded, jnp.ones((6, 6)))
    assert values.shape == (6,)
    assert np.ptp(values) > 0
