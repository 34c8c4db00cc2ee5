"""An update with a NaN or a spike changes nothing but the counters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acrlpd.agents.health import MEMORY, Health, HealthConfig, judge


def health(mean, applied):
    return dataclasses.replace(Health.create(("loss",)), means={"loss": jnp.float32(mean)}, applied=jnp.int32(applied))


@pytest.mark.parametrize(
    ("mean", "applied", "value", "config", "ok"),
    [
        (1.0, MEMORY, 99.0, HealthConfig(spike_floor=0.0), True),
        (1.0, MEMORY, 101.0, HealthConfig(spike_floor=0.0), False),
        (1.0, MEMORY, 101.0, HealthConfig(spike_floor=200.0), True),  # below the floor nothing is a spike
        (1.0, MEMORY - 1, 101.0, HealthConfig(spike_floor=0.0), True),  # the mean is not known yet
        (1.0, MEMORY, 1e9, HealthConfig(spike_factor=None), True),
        (1.0, 0, float("nan"), HealthConfig(spike_factor=None), False),
        (1.0, 0, float("inf"), HealthConfig(), False),
    ],
)
def test_judge(mean, applied, value, config, ok):
    found, after = judge(health(mean, applied), {"loss": jnp.float32(value)}, config)
    assert bool(found) is ok
    assert (int(after.applied), int(after.skipped), int(after.skipped_in_a_row)) == (applied + ok, not ok, not ok)
    expected = mean + max(1 / (applied + 1), 1 / MEMORY) * (value - mean) if ok else mean
    np.testing.assert_allclose(after.means["loss"], expected, rtol=1e-5)


def test_limits_are_checked():
    with pytest.raises(ValueError, match=r"spike_factor must be a number above 1 \(inf too\) or None, got 1"):
        HealthConfig(spike_factor=1)
    with pytest.raises(ValueError, match="spike_floor must be a number of at least 0"):
        HealthConfig(spike_floor=-1)


def test_a_poisoned_batch_leaves_parameters_and_optimisers_alone(toys):
    agent, batch = toys.agent(toys.config()), toys.batch()
    agent, metrics = agent.update(batch, toys.key(1))
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(np.asarray, (agent.params, agent.opt_state, agent.target_critic))
    for count in (1, 2):
        poisoned = dataclasses.replace(batch, rewards=batch.rewards.at[0, 0].set(jnp.nan))
        agent, metrics = agent.update(poisoned, toys.key(2))
        assert (float(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, count)
    after = jax.tree.map(np.asarray, (agent.params, agent.opt_state, agent.target_critic))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    agent, metrics = agent.update(batch, toys.key(3))
    assert (int(agent.step), int(agent.health.skipped), int(metrics["skipped_in_a_row"])) == (4, 2, 0)
    assert any(
        (np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (agent.params, before[0])), strict=True)
    )
