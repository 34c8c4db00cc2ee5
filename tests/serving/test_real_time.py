"""Real-time chunking: chunks that continue the one being executed, and answers that are due at a given time."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd import deploy
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Compose, Normalize
from acrlpd.models import flow
from acrlpd.models.mlp_flow import MLPFlowConfig
from acrlpd.serving import budget
from acrlpd.serving.budget import Budget, Plan
from acrlpd.serving.policy import Policy
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.types import Observation

sys.path.insert(0, str(Path(__file__).parent))
from conftest import OBS, running

# -- the equations -----------------------------------------------------------------------------------------------------


def test_prefix_weights_by_hand():
    """Two steps frozen, four to decay over, two free."""
    decaying = [c * (np.exp(c) - 1) / (np.e - 1) for c in (0.8, 0.6, 0.4, 0.2)]
    np.testing.assert_allclose(flow.prefix_weights(2, 6, 8), [1, 1, *decaying, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(flow.prefix_weights(3, 3, 4), [1, 1, 1, 0])
    np.testing.assert_array_equal(flow.prefix_weights(5, 2, 4), [1, 1, 0, 0])
    assert not flow.prefix_weights(0, 0, 4).any()


def reference(velocity, noise, previous, weights, num_steps):
    """One chunk in the paper's words: tau from 0 (noise) to 1 (data), the whole Jacobian, no batches."""

    def denoise(flat, tau):
        return flat + (1 - tau) * velocity(flat.reshape(noise.shape), tau).ravel()

    denoise, jacobian_of = jax.jit(denoise), jax.jit(jax.jacobian(denoise))
    x, dtau = noise.ravel(), 1 / num_steps
    for step in range(num_steps):
        tau = step * dtau
        denoised, jacobian = np.asarray(denoise(x, tau)), np.asarray(jacobian_of(x, tau))
        error = (previous.ravel() - denoised) * np.repeat(weights, noise.shape[1])
        r_squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        pull = min(5.0, (1 - tau) / (tau * r_squared)) if tau else 5.0
        x = x + dtau * ((denoised - x) / (1 - tau) + pull * (error @ jacobian))
    return x.reshape(noise.shape)


def test_guided_samples_follow_the_paper():
    policy = MLPFlowConfig(state_dim=2, action_dim=3, action_horizon=4, hidden_dims=(8, 8)).create(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    observation = Observation(state=jnp.asarray(rng.normal(size=(2, 2)), jnp.float32))
    noise, previous = rng.normal(size=(3, 2, 4, 3)).astype(np.float32), rng.normal(size=(2, 4, 3)).astype(np.float32)
    weights = np.stack([flow.prefix_weights(1, 3, 4), np.zeros(4, np.float32)])
    prefix = policy.encode(observation)
    guided = flow.Guided(policy, flow.Guidance(jnp.asarray(previous), jnp.asarray(weights)))
    samples = flow.sample(guided, prefix, jnp.asarray(noise), num_steps=5)

    one = policy.encode(Observation(state=observation.state[:1]))

    def velocity(x, tau):
        return -policy.velocity(one, x[None, None], jnp.full((1, 1), 1 - tau, jnp.float32))[0, 0]

    expected = reference(velocity, noise[1, 0], previous[0], weights[0], 5)
    np.testing.assert_allclose(samples[1, 0], expected, atol=2e-4)
    unguided = flow.sample(policy, prefix, jnp.asarray(noise), num_steps=5)
    np.testing.assert_allclose(samples[:, 1], unguided[:, 1], atol=1e-6)
    assert not np.allclose(samples[:, 0], unguided[:, 0], atol=1e-2)


# -- through policy and server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_time(trained) -> Policy:
    return deploy.trained_policy(trained, deploy.ActingOptions(real_time=True, num_steps=10))


def asking(seed: int, **options) -> dict:
    return OBS | {OPTIONS_KEY: {"seed": seed, **options}}


def test_a_chunk_continues_the_one_before(real_time):
    """The frozen steps agree far better than without guidance, and the critic still chooses among candidates."""
    previous = real_time.infer(asking(1))["actions"][1:]
    free = real_time.infer(asking(2))["actions"]
    answer = real_time.infer(asking(2, previous_actions=previous, delay=3, statistics=True))

    def gap(actions):
        return np.abs(actions[:3] - previous[:3]).max()

    assert gap(answer["actions"]) < 0.2 * gap(free)
    told = answer["policy_statistics"]
    assert len(set(told["q_candidates"])) == 4
    assert told["q"] == max(told["q_candidates"])


def test_old_clients_in_the_same_batch_get_what_they_always_got(real_time):
    requests = [real_time.prepare(asking(2)), real_time.prepare(asking(3, previous_actions=np.zeros((2, 2)), delay=1))]
    mixed = real_time.infer_batch(requests)[0]["actions"]
    np.testing.assert_allclose(mixed, real_time.infer(asking(2))["actions"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"previous_actions": np.zeros((6, 2))}, "has 6 steps, a chunk has 5"),
        ({"previous_actions": np.zeros((2, 2)), "delay": -1}, "from 0 to the 2 steps"),
        ({"previous_actions": np.zeros(2)}, "floats of shape"),
        ({"previous_actions": np.zeros((2, 1))}, "where the model has"),
        ({"previous_actions": np.full((2, 2), np.nan)}, "not finite"),
        ({"delay": 1}, "from 0 to the 0 steps"),
        ({"deadline_ms": 5}, "needs a policy with a latency budget"),
    ],
)
def test_options_that_make_no_sense_are_refused(real_time, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        real_time.prepare(asking(1, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"previous_actions": np.zeros((0, 2), np.float32)}, "is empty"),
        ({"previous_actions": np.zeros((0, 2), np.float32), "delay": 2}, "is empty"),
        ({"previous_actions": np.array([]), "delay": 1}, "is empty"),
        ({"previous_actions": [], "delay": 1}, "is empty"),
        ({"previous_actions": None, "delay": 1}, "is empty"),
        ({"previous_actions": np.zeros((2, 2)), "delay": 3}, "has 2 steps, the delay is 3"),
        ({"previous_actions": np.zeros((5, 2)), "delay": 9}, "has 5 steps, the delay is 9"),
    ],
)
def test_a_rest_that_cannot_guide_gives_the_unguided_chunk_and_says_so(real_time, options, reason):
    free = real_time.infer(asking(2))
    answer = real_time.infer(asking(2, **options))
    np.testing.assert_array_equal(answer["actions"], free["actions"])
    assert reason in answer["real_time"]
    assert "real_time" not in free


def test_the_log_tells_once_that_a_rest_cannot_guide(trained, caplog):
    policy = deploy.trained_policy(trained, deploy.ActingOptions(real_time=True))
    for _ in range(3):
        policy.prepare(asking(1, previous_actions=np.zeros((1, 2), np.float32), delay=2))
    assert caplog.text.count("has 1 steps, the delay is 2") == 1


def test_a_connection_outlives_a_rest_that_cannot_guide(real_time):
    with running(real_time, max_batch_size=1) as server:
        client = server.client()
        for _ in range(2):
            answer = client.infer(asking(2, previous_actions=np.zeros((1, 2), np.float32), delay=3))
            assert answer["real_time"] == "unguided: previous_actions has 1 steps, the delay is 3"
        guided = client.infer(asking(2, previous_actions=np.zeros((3, 2), np.float32), delay=3))
        assert "real_time" not in guided


def test_real_time_chunking_must_be_switched_on(policy):
    with pytest.raises(ValueError, match="which is off"):
        policy.prepare(asking(1, previous_actions=np.zeros((2, 2))))


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_smaller_plans():
    plans = budget.smaller_plans(Plan(32, 10))
    assert plans == (Plan(32, 10), Plan(8, 10), Plan(2, 10), Plan(1, 10), Plan(1, 5))
    assert budget.smaller_plans(Plan(1, 1)) == (Plan(1, 1),)
    assert budget.smaller_plans(Plan(8, 10, guided=True)) == (
        *(Plan(8, 10, guided=True), Plan(2, 10, guided=True)),
        *budget.smaller_plans(Plan(8, 10)),
    )
    assert budget.smaller_plans(Plan(1, 1, guided=True)) == (Plan(1, 1, guided=True), Plan(1, 1))


def test_the_largest_plan_that_fits_is_chosen_and_comes_back_after_a_slow_time():
    plans = (Plan(8, 10), Plan(2, 10), Plan(1, 10))
    measured = Budget(plans)
    for plan, seconds in zip(plans, (0.8, 0.2, 0.1), strict=True):
        measured.measured(plan, 1, seconds)
    assert measured.choose(1, 1.0) == plans[0]
    assert measured.choose(1, 0.8) == plans[1]  # it would be ready at the last moment
    assert measured.choose(1, 0.15) == plans[2]
    assert measured.choose(1, 0.01) == plans[2]
    for _ in range(50):
        measured.took(plans[0], 1, 1.6)
    assert measured.expected(plans[1], 1) == pytest.approx(0.4, rel=0.02)
    assert measured.choose(1, 1.0) == plans[1]
    for _ in range(50):
        measured.took(plans[1], 1, 0.2)
    assert measured.choose(1, 1.0) == plans[0]


class Sleeper:
    """A sampler whose time is known: 20 ms a candidate."""

    plan, action_shape = Plan(16, 4), (5, 2)

    def __call__(self, observation, draws, plan):
        time.sleep(0.02 * plan.num_samples)
        return np.zeros((len(observation.state), 5, 2), np.float32), {}


def test_an_answer_is_in_time():
    stats = {"state": NormStats(np.zeros(3), np.ones(3)), "actions": NormStats(np.zeros(2), np.ones(2))}
    spec = Observation(state=jax.ShapeDtypeStruct((3,), np.float32))
    policy = Policy(Sleeper(), Compose([Normalize(stats)]), spec=spec, budget_s=2.0)
    with running(policy, max_batch_size=1) as server:
        client = server.client()
        chosen = {
            deadline: client.infer(asking(0, deadline_ms=deadline, statistics=True))["policy_statistics"]["num_samples"]
            for deadline in (1000, 200, 1)
        }
        assert chosen == {1000: 16, 200: 4, 1: 1}
        start = time.monotonic()
        client.infer(asking(0, deadline_ms=200))
        assert time.monotonic() - start < 0.32  # which all candidates take
