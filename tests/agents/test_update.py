"""What surrounds the losses in an update: micro-batches, several updates a call, averages; and the baselines."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from acrlpd.agents import agent as agent_module
from acrlpd.agents import candidates, sampling
from acrlpd.agents.config import ImplicitConfig, TemperatureConfig
from acrlpd.agents.draws import Draws, deal
from acrlpd.agents.losses import LossWeights
from acrlpd.models import flow
from acrlpd.models.gaussian import ChunkGaussianConfig
from acrlpd.types import Observation

WEIGHTS = LossWeights(critic_weight=0.7, actor_weight=1.3, bc_weight=0.9, alpha_weight=0.6)
IMPLICIT = {"target": "implicit", "temperature": TemperatureConfig(adaptive=False)}


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


# -- micro-batches -----------------------------------------------------------------------------------------------------


def test_micro_batches_are_dealt():
    """Rows 0, 2, 4 and 1, 3, 5: two devices with three rows each give both micro-batches work."""
    np.testing.assert_array_equal(deal(jnp.arange(6), 2), [[0, 2, 4], [1, 3, 5]])
    noise = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(deal(noise, 3, axis=1)[1], [[1, 4], [7, 10]])
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 micro-batches"):
        deal(jnp.arange(6), 4)


def test_micro_batches_add_up_to_the_batch(toys):
    """Gradients of all groups and all metrics, from three micro-batches and from the whole."""
    config = toys.config(extraction="distill", critic={"q_aggregation": "subset"}, huber_delta=0.5)
    agent, batch = toys.agent(config), toys.batch()
    parts = dataclasses.replace(config, gradient_accumulation_steps=3)
    in_parts = dataclasses.replace(agent, nets=dataclasses.replace(agent.nets, config=parts))
    gradients = toys.jit(lambda agent: agent_module._gradients(agent, batch, toys.key(0), WEIGHTS))
    (whole, metrics), (summed, part_metrics) = gradients(agent), gradients(in_parts)
    assert_close(summed, whole, rtol=1e-4, atol=1e-6)
    for name in ("total_loss", "critic_loss", "bc_loss", "actor_loss", "alpha_loss", "q_mean", "target_q_mean"):
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-4, err_msg=name)


def test_micro_batches_of_an_implicit_target_add_up_too(toys):
    agent, batch = toys.agent(toys.config(**IMPLICIT)), toys.batch()
    parts = dataclasses.replace(agent.config, gradient_accumulation_steps=3)
    in_parts = dataclasses.replace(agent, nets=dataclasses.replace(agent.nets, config=parts))
    gradients = toys.jit(lambda agent: agent_module._gradients(agent, batch, toys.key(0), WEIGHTS))
    (whole, metrics), (summed, part_metrics) = gradients(agent), gradients(in_parts)
    assert_close(summed, whole, rtol=1e-4, atol=1e-6)
    for name in ("total_loss", "value_loss", "v_mean", "advantage_mean", "advantage_positive", "target_q_mean"):
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-4, err_msg=name)


# -- an implicit target ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statistic", "expected"), [("expectile", 0.8), ("quantile", 1.0)])
def test_v_approaches_the_upper_end_of_what_the_data_earned(statistic, expected, toys):
    """One state, two chunks that are as frequent and end with 1 or 0: the expectile of these at level 0.8 is 0.8, where
    0.8 (1 - V) = 0.2 V; the quantile is 1, which more than a fifth of them earned. The mean is 0.5."""
    config = toys.config(**IMPLICIT, implicit=ImplicitConfig(statistic, 0.8))
    agent = toys.agent(config)
    batch, good = toys.batch("terminal_last"), jnp.arange(6) % 2 == 0
    batch = batch.replace(
        observations=Observation(state=jnp.ones((6, 4))),
        actions=jnp.where(good, 0.5, -0.5)[:, None, None] * jnp.ones((6, 3, 2)),
        rewards=jnp.zeros((6, 3)).at[:, 0].set(good),
    )
    for seed in range(600):
        agent, metrics = toys.update(agent, batch, toys.key(seed), WEIGHTS)
    np.testing.assert_allclose(metrics["q_mean"], 0.5, atol=0.02)
    np.testing.assert_allclose(metrics["v_mean"], expected, atol=0.05)
    np.testing.assert_allclose(metrics["advantage_mean"], 0.5 - expected, atol=0.05)


# -- several updates a call, moving average ----------------------------------------------------------------------------


def test_updates_in_one_call_are_the_single_ones(toys):
    """Other batches, keys and weights each time; with a moving average of the policy, which is what acts."""
    agent = toys.agent(toys.config(policy_ema_decay=0.75, best_of_n_samples=2))
    agent = dataclasses.replace(agent, step=jnp.int32(8))
    batches = [toys.batch(seed=seed) for seed in range(3)]
    keys = [toys.key(seed) for seed in range(3)]
    weights = [dataclasses.replace(WEIGHTS, bc_weight=0.1 * seed) for seed in range(3)]
    single, singles, average = agent, [], agent.ema["policy"]
    for share, *each in zip((6 / 14, 6 / 15, 6 / 16), batches, keys, weights, strict=True):
        single, metrics = toys.update(single, *each)
        singles.append(metrics)
        average = jax.tree.map(lambda a, b, s=share: (1 - s) * a + s * b, average, single.params["policy"])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    together, metrics = toys.jit(agent_module._updates.__wrapped__)(
        agent, stacked, jnp.stack(keys), jax.tree.map(lambda *x: jnp.array(x), *weights)
    )
    assert_close((together.params, together.ema), (single.params, single.ema), rtol=1e-4, atol=1e-6)
    assert_close(single.ema["policy"], average, rtol=1e-5, atol=1e-6)
    assert together.step == 8 + 3
    assert_close(metrics, jax.tree.map(lambda *x: jnp.stack(x), *singles), rtol=1e-3, atol=1e-5)

    observations = toys.batch().observations
    other = dataclasses.replace(together, params=together.params | {"policy": agent.params["policy"]})
    np.testing.assert_array_equal(
        other.sample_actions(observations, keys[0]), together.sample_actions(observations, keys[0])
    )


# -- candidates --------------------------------------------------------------------------------------------------------


def test_candidates_are_ranked_after_few_steps_and_the_chosen_one_is_drawn_in_all(toys):
    agent = toys.agent(toys.config(candidate_flow_steps=1, flow_steps=4))
    observations, rng = toys.batch().observations, toys.key(3)
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(observations)
    noise = jax.random.normal(jax.random.split(rng)[0], (4, 6, 3, 2))
    rough = flow.sample(modules.policy, prefix, noise, num_steps=1)
    fine = flow.sample(modules.policy, prefix, noise, num_steps=4)
    q = modules.critic.aggregate(modules.critic(prefix.features, prefix.state, rough))
    best = np.argmax(q, axis=0)
    assert len(set(best.tolist())) > 1
    chunk = agent.sample_actions(observations, rng)
    np.testing.assert_allclose(chunk, np.asarray(fine)[best, np.arange(6)], atol=1e-5)
    assert np.abs(chunk - np.asarray(rough)[best, np.arange(6)]).max() > 1e-2


def test_bytes_of_a_program():
    """By hand: 400 of x * 2, dead after the 800 of the concatenation; those and 4 of the sum."""

    def program(x):
        doubled = x * 2
        twice = jnp.concatenate([doubled, doubled])
        return twice.sum()

    one = jax.make_jaxpr(program)(jnp.zeros(100, jnp.float32)).jaxpr
    assert sampling.intermediate_bytes(one) == 400 + 800
    loop = jax.make_jaxpr(lambda x: jax.lax.map(program, x))(jnp.zeros((5, 100), jnp.float32)).jaxpr
    assert 1200 + 5 * 4 <= sampling.intermediate_bytes(loop) <= 1200 + 5 * 4 + 400 + 100  # and the slice it reads


def test_bytes_of_weights_are_there_once():
    """Their slices depend on no argument, in a loop or not: counted are three results of 400 bytes, two at a time."""
    weights = jnp.ones((2, 1000, 100))

    def program(x, weights=weights):
        for layer in jnp.unstack(weights):
            x = x + layer.sum(axis=0)
        return x

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: program(x), x)

    x = jnp.zeros(100, jnp.float32)
    assert sampling.intermediate_bytes(jax.make_jaxpr(program)(x).jaxpr) == 800
    assert 800 <= sampling.intermediate_bytes(jax.make_jaxpr(loop)(x).jaxpr) <= 1300  # and the loop's own result
    assert sampling.intermediate_bytes(jax.make_jaxpr(program)(x, weights).jaxpr) > weights.nbytes


@pytest.mark.parametrize(("max_bytes", "expected"), [(1, 1), (400 * 3 + 1, 3), (10**9, 7)])
def test_auto_takes_as_many_candidates_as_fit(max_bytes, expected):
    """One candidate needs 400 bytes here; never fewer than one, never more than there are."""
    noise = jnp.zeros((7, 10, 5, 2))
    assert sampling.fitting_block(lambda x: x * 2, noise, max_bytes) == expected


def test_auto_chooses_as_the_others_do(toys):
    config = toys.config(best_of_n_strategy="auto", best_of_n_bytes=4000)
    agent = toys.agent(config)
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(toys.batch().observations)
    noise = jax.random.normal(toys.key(5), (5, 6, 3, 2))
    chunks, _ = candidates.propose(modules, config, prefix, noise, 3)
    np.testing.assert_allclose(chunks, flow.sample(modules.policy, prefix, noise, num_steps=3), atol=1e-5)


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_imitation_alone_moves_the_policy_alone(toys):
    agent = toys.agent(toys.config(algorithm="bc"))
    after, metrics = toys.update(agent, toys.batch(), toys.key(0), WEIGHTS)
    moved = {group for group in agent.params if metrics[f"grad_norm/{group}"] > 0}
    assert moved == {"policy"}
    observations = toys.batch().observations
    np.testing.assert_array_equal(
        after.sample_actions(observations, toys.key(1)), after.sample_actions(observations, toys.key(1), mode="bc")
    )


@pytest.fixture(scope="module")
def soft_agent(toys):
    return make_soft_agent(toys)


def make_soft_agent(toys, **critic):
    config = toys.config(algorithm="rlpd_ac", critic={"q_aggregation": "mean", **critic}, target_samples=1)
    policy = ChunkGaussianConfig(4, 2, 3, (8,)).create(nnx.Rngs(params=toys.key(0)))
    return toys.agent(config, policy=policy, optimizer=optax.sgd(1.0))


def gaussian(policy, state):
    """Mean and log standard deviation [b d] in float64, from the layers' arrays."""

    def layer(x, linear):
        return x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...], np.float64)

    hidden = np.maximum(layer(np.asarray(state, np.float64), policy.hidden[0]), 0)
    return layer(hidden, policy.mean), np.clip(layer(hidden, policy.log_std), -20, 2)


def log_density(raw, mean, log_std):
    """Of tanh(raw), by the rule of a changed variable."""
    normal = -0.5 * ((raw - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.sum(normal - np.log(1 - np.tanh(raw) ** 2), axis=-1)


@pytest.mark.parametrize("judged", [3, 2])
def test_soft_actor_critic_equals_numpy(judged, soft_agent, toys):
    """Every loss, and what each moves, from the equations of RLPD-AC; the critic's values are taken as they come.

    If critics judge two of three steps, the density is that of these two, since Q says nothing of the third.
    """
    agent, batch, rng = soft_agent if judged == 3 else make_soft_agent(toys, horizon=judged), toys.batch(), toys.key(0)
    draws = Draws.of_update(rng, agent.config, (6, 3, 2))
    modules = agent.nets.modules(agent.params, agent.frozen)
    mean, log_std = gaussian(modules.policy, batch.observations.state)
    raw = mean + np.exp(log_std) * np.asarray(draws.actor[0]).reshape(6, -1)
    log_prob = log_density(*(each[:, : judged * 2] for each in (raw, mean, log_std)))
    nothing = jnp.zeros((6, 0))

    def q(critic, state, flat):
        chunks = jnp.asarray(flat, jnp.float32).reshape(1, 6, 3, 2)
        return np.asarray(critic(nothing, state, chunks))[:, 0].mean(axis=0)

    next_mean, next_std = gaussian(modules.policy, batch.next_observations.state)
    next_chunk = np.tanh(next_mean + np.exp(next_std) * np.asarray(draws.candidates[0]).reshape(6, -1))
    target_critic = nnx.merge(agent.nets.critic_def, agent.target_critic)
    rewards = sum(0.9**k * batch.valid[:, k] * batch.rewards[:, k] for k in range(judged))
    target = rewards + 0.9**judged * batch.bootstrap_mask * q(target_critic, batch.next_observations.state, next_chunk)
    alpha = float(agent.temperature)
    actions = np.clip(np.asarray(batch.actions, np.float64).reshape(6, -1), -1 + 1e-5, 1 - 1e-5)
    expected = {
        "target_q_mean": target.mean(),
        "actor_loss": np.mean(alpha * log_prob - q(modules.critic, batch.observations.state, np.tanh(raw))),
        "alpha_loss": alpha * (-log_prob.mean() + 0.5 * judged * 2),
        "bc_loss": -np.mean(log_density(np.arctanh(actions), mean, log_std)),
    }
    _, metrics = toys.update(agent, batch, rng, WEIGHTS)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_soft_actor_critic_moves_by_the_table(soft_agent, toys):
    terms = {"critic_weight": "critic", "bc_weight": "policy", "actor_weight": "policy", "alpha_weight": "temperature"}
    for term, moved in terms.items():
        only = dataclasses.replace(LossWeights(0.0, 0.0, 0.0, 0.0), **{term: 1.0})
        _, metrics = toys.update(soft_agent, toys.batch(), toys.key(0), only)
        assert {group for group in soft_agent.params if metrics[f"grad_norm/{group}"] != 0} == {moved}


def test_soft_policy_acts_within_bounds_and_at_random(soft_agent, toys):
    seen = Observation(state=jnp.ones((6, 4)))
    first, second = (soft_agent.sample_actions(seen, toys.key(seed)) for seed in range(2))
    assert np.abs(first).max() <= 1
    assert np.abs(first - second).max() > 1e-3
