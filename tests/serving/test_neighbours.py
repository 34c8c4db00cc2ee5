"""Who else asks changes no answer: each is a function of its own observation, seed and options."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acrlpd import deploy
from acrlpd.data.view.transforms import Compose, Normalize
from acrlpd.models.mlp_flow import MLPFlowConfig
from acrlpd.serving import codec
from acrlpd.serving.policy import NotFiniteError, Policy
from acrlpd.serving.request import OPTIONS_KEY, Request
from acrlpd.types import Observation

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CONFIG, STATS, running, save

SIZES = (1, 4)
AMPLE_MS, NONE_MS = 1e9, 1e-9  # deadlines that leave time for everything, and for the smallest plan alone


@pytest.fixture(scope="module", params=["best_of_n", "candidate_steps", "distill", "flow"])
def policy(request, tmp_path_factory) -> Policy:
    """A policy with every option on, compiled for batches of up to four."""
    made = flow_alone() if request.param == "flow" else agent(request.param, tmp_path_factory.mktemp("run"))
    made.warm_up(SIZES)
    return made


def agent(kind: str, folder: Path) -> Policy:
    changes = {"extraction": "distill"} if kind == "distill" else {}
    changes |= {"candidate_flow_steps": 1} if kind == "candidate_steps" else {}
    save(folder, 1, config=dataclasses.replace(CONFIG, agent=dataclasses.replace(CONFIG.agent, **changes)))
    options = deploy.ActingOptions(real_time=True, latency_budget_ms=AMPLE_MS)
    return deploy.trained_policy(deploy.load_trained(folder), options)


def flow_alone() -> Policy:
    model = MLPFlowConfig(state_dim=3, action_dim=2, action_horizon=5, hidden_dims=(16,)).create(nnx.Rngs(0))
    spec = Observation(state=jax.ShapeDtypeStruct((3,), np.float32))
    return Policy(model, Compose([Normalize(STATS)]), spec=spec, real_time=True, budget_s=AMPLE_MS / 1000)


REST = st.sampled_from([None, (0, 0), (1, 2), (3, 1), (5, 2)])  # steps of previous_actions, delay
ASKED = st.builds(
    lambda seed, rest, deadline_ms, statistics, state: (seed, rest, deadline_ms, statistics, state),
    st.integers(0, 3),
    REST,
    st.sampled_from([None, AMPLE_MS, NONE_MS]),
    st.booleans(),
    st.sampled_from([-2.0, 0.0, 1.0]),
)


def prepared(policy: Policy, asked) -> Request:
    seed, rest, deadline_ms, statistics, state = asked
    options = {"seed": seed, "statistics": statistics}
    if rest is not None:
        options |= {"previous_actions": np.full((rest[0], 2), 0.3, np.float32), "delay": rest[1]}
    if deadline_ms is not None:
        options["deadline_ms"] = deadline_ms
    return policy.prepare({"state": np.full(3, state, np.float32), OPTIONS_KEY: options})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(everyone=st.lists(ASKED, min_size=1, max_size=4))
def test_an_answer_is_what_it_is_alone(policy, everyone):
    requests = [prepared(policy, asked) for asked in everyone]
    size = next(each for each in SIZES if each >= len(requests))
    together = policy.infer_batch(requests, size=size)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = policy.infer_batch([request], size=1)
        np.testing.assert_allclose(answer["actions"], alone["actions"], atol=1e-5)
        assert answer.keys() == alone.keys()
        assert answer.get("real_time") == alone.get("real_time")
        if "policy_statistics" in alone:
            told, expected = answer["policy_statistics"], alone["policy_statistics"]
            assert (told["num_samples"], told["num_steps"]) == (expected["num_samples"], expected["num_steps"])


def test_a_given_noise_stays_with_its_request():
    policy = flow_alone()
    policy.warm_up(SIZES)
    plain = prepared(policy, (1, None, None, False, 0.0))
    noisy = dataclasses.replace(plain, noise=np.ones((5, 2), np.float32))
    together = policy.infer_batch([plain, noisy, plain])
    for request, answer in zip([plain, noisy, plain], together, strict=True):
        np.testing.assert_allclose(answer["actions"], policy.infer_batch([request])[0]["actions"], atol=1e-6)


def test_nothing_is_compiled_for_a_mixture(policy, monkeypatch):
    """Kinds that meet run in sizes that are compiled already."""
    sizes = []
    sampler = policy._sampler

    class Counting:
        plan, action_shape = sampler.plan, sampler.action_shape

        def __call__(self, observation, draws, plan):
            sizes.append(len(observation.state))
            return sampler(observation, draws, plan)

    monkeypatch.setattr(policy, "_sampler", Counting())
    mixture = [(0, None, None, False, 0.0), (1, (3, 1), None, False, 0.0), (2, None, NONE_MS, False, 0.0)]
    policy.infer_batch([prepared(policy, asked) for asked in mixture], size=4)
    assert sizes == [1, 1, 1]


def blowing_up(policy: Policy) -> Policy:
    """The policy, with a state from which its actions are not finite: the sum of the state overflows."""
    sampler = policy._sampler

    class BlowsUp:
        plan, action_shape = sampler.plan, sampler.action_shape

        def __call__(self, observation, draws, plan):
            chunks, values = sampler(observation, draws, plan)
            bad = np.asarray(observation.state)[:, 0] > 1e6
            return np.where(bad[:, None, None], np.nan, np.asarray(chunks)), values

    spec = Observation(state=jax.ShapeDtypeStruct((3,), np.float32))
    return Policy(BlowsUp(), Compose([Normalize(STATS)]), spec=spec)


def test_actions_that_become_infinite_in_the_robots_units_are_not_sent():
    """As those of a tokenizer may be, whose model answers whole numbers."""

    class Decoding:
        def __call__(self, data):
            return data

        def inverse(self, data):
            return data | {"actions": data["actions"] / np.zeros((5, 1), np.float32)}

    model = MLPFlowConfig(state_dim=3, action_dim=2, action_horizon=5, hidden_dims=(16,)).create(nnx.Rngs(0))
    policy = Policy(model, Compose([Decoding()]), spec=Observation(state=jax.ShapeDtypeStruct((3,), np.float32)))
    with np.errstate(divide="ignore"), pytest.raises(NotFiniteError):
        policy.infer({"state": np.zeros(3, np.float32)})


def test_actions_that_are_not_finite_fail_their_own_request_alone():
    policy = blowing_up(flow_alone())
    good, bad = ({"state": np.full(3, each, np.float32), OPTIONS_KEY: {"seed": 1}} for each in (0.0, 1e9))
    with pytest.raises(NotFiniteError, match="not finite") as failed:
        policy.infer_batch([policy.prepare(each) for each in (good, bad)])
    answer, missing = failed.value.answers
    np.testing.assert_allclose(answer["actions"], policy.infer(good)["actions"], atol=1e-6)
    assert missing is None
    with running(policy, max_batch_size=2, batch_wait_s=5.0) as server:
        clients = server.client(), server.client()
        clients[0].connection.send(codec.pack(good))
        with pytest.raises(RuntimeError, match="NotFiniteError"):
            clients[1].infer(bad)
        received = codec.unpack(clients[0].connection.recv(timeout=60))
        np.testing.assert_allclose(received["actions"], answer["actions"], atol=1e-6)
