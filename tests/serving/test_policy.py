import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots.libero import Libero
from acrlpd.data.view.transforms import Compose, Data, DeltaActions, Normalize, PadToModel, ResizeImages, to_observation
from acrlpd.models import gemma, siglip, weights
from acrlpd.models.mlp_flow import MLPFlow, MLPFlowConfig
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.serving.budget import Plan
from acrlpd.serving.policy import Draws, FlowSampler, Policy

# -- openpi's numbers --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FixedTokens:
    """In the place of a tokenizer, as in the golden call."""

    tokens: np.ndarray
    mask: np.ndarray

    def __call__(self, data: Data) -> Data:
        return data | {"tokenized_prompt": self.tokens, "tokenized_prompt_mask": self.mask}

    def inverse(self, data: Data) -> Data:
        return data


def tiny_pi0(folder: Path, meta: dict[str, Any], model: str) -> Pi0:
    """openpi's tiny model with its parameters."""
    sizes = meta["config"]
    tower = dict(sizes["vit"])
    config = Pi0Config(
        pi05=model == "pi05",
        action_dim=sizes["action_dim"],
        action_horizon=sizes["action_horizon"],
        max_token_len=sizes["max_token_len"][model],
        paligemma_variant=gemma.Config(**sizes["gemma"]["tiny"]),
        action_expert_variant=gemma.Config(**sizes["gemma"]["tiny_expert"]),
        vision_variant=siglip.Config(image_size=tower.pop("image"), patch_size=tower.pop("patch"), **tower),
        vocab_size=sizes["vocab"],
        dtype="float32",
        remat=False,
    )
    policy = nnx.eval_shape(lambda: config.create(nnx.Rngs(0)))
    weights.load_into(policy, weights.read_params(folder / f"{model}_params.npz"))
    return policy


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def call(request, shared):
    """A golden call: the policy, its input and openpi's answer."""
    folder, model = shared / "golden", request.param
    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / f"{model}_policy.npz") as file:
        arrays = dict(file)
    pi0 = tiny_pi0(folder, meta, model)
    stats = normalize.load(folder / f"{model}_policy_norm_stats.json")
    side = pi0.config.image_size
    transform = Compose(
        [
            Libero(),
            DeltaActions(arrays["delta_mask"].tolist()),
            Normalize(stats, quantiles=meta[f"{model}_policy"]["quantiles"]),
            ResizeImages(side, side),
            FixedTokens(arrays["tokens"], arrays["mask"]),
            PadToModel(pi0.action_dim),
        ]
    )
    obs = {key: value for key, value in arrays.items() if key.startswith("observation/")}
    return Policy(pi0, transform), obs, arrays, meta[f"{model}_policy"]


@pytest.mark.golden
@pytest.mark.slow
def test_a_whole_call_is_openpis(call):
    policy, obs, arrays, described = call
    answer = policy.infer(obs, noise=arrays["noise"])
    np.testing.assert_allclose(answer["actions"], arrays["actions"], atol=1e-4)
    assert answer["actions"].dtype.name == described["actions_dtype"]
    assert sorted(answer) == sorted(described["result_keys"])
    assert answer["policy_timing"]["infer_ms"] > 0
    with_batch_axis = policy.infer(obs, noise=arrays["noise"][None])
    np.testing.assert_array_equal(with_batch_axis["actions"], answer["actions"])


# -- a model of ours ---------------------------------------------------------------------------------------------------

TINY = MLPFlowConfig(state_dim=2, action_dim=3, action_horizon=4, hidden_dims=(8,))
STATS = {
    "state": NormStats(np.array([1.0, -1.0]), np.array([2.0, 0.5])),
    "actions": NormStats(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0])),
}
OBS = {"state": np.array([0.5, 1.5])}


@pytest.fixture(scope="module")
def flow_policy() -> MLPFlow:
    return TINY.create(nnx.Rngs(0))


def make_policy(model, **options) -> Policy:
    return Policy(model, Compose([Normalize(STATS)]), **options)


def test_answer_is_in_the_robots_units(flow_policy):
    """The state comes back as it was; actions are the sampled ones times std plus mean."""
    noise = np.ones((4, 3), np.float32)
    answer = make_policy(flow_policy).infer(OBS, noise=noise)
    np.testing.assert_allclose(answer["state"], OBS["state"], atol=1e-6)
    normalized = (OBS["state"] - [1.0, -1.0]) / [2.000001, 0.500001]
    observation = to_observation({"state": normalized[None]})
    draws = Draws(np.zeros((1, 2), np.uint32), noise[None])
    chunk = np.asarray(FlowSampler(flow_policy)(observation, draws, Plan(1, 10))[0][0])
    np.testing.assert_allclose(answer["actions"], chunk * [1.0, 2.0, 3.0] + [5.0, 6.0, 7.0], rtol=1e-5)


def test_each_call_draws_anew_and_the_key_decides(flow_policy):
    """openpi splits its key once a call and draws from the second half."""
    policy, twin = make_policy(flow_policy), make_policy(flow_policy, rng=jax.random.key(0))
    first, second = (policy.infer(OBS)["actions"] for _ in range(2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(twin.infer(OBS)["actions"], first)
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[1], (1, 4, 3))
    np.testing.assert_array_equal(policy.infer(OBS, noise=np.asarray(noise))["actions"], first)


def test_noise_of_another_shape_is_refused(flow_policy):
    with pytest.raises(ValueError, match=r"noise must have the shape \(1, 4, 3\)"):
        make_policy(flow_policy).infer(OBS, noise=np.zeros((3, 4)))


def test_model_is_traced_once_for_a_shape(flow_policy, monkeypatch):
    traced, encode = [], MLPFlow.encode

    def counting(self, observation):
        traced.append(observation.state.shape)
        return encode(self, observation)

    monkeypatch.setattr(MLPFlow, "encode", counting)
    policy = make_policy(flow_policy)
    for _ in range(3):
        policy.infer(OBS)
    assert traced == [(1, 2)]


def test_observation_is_left_as_it_was(flow_policy):
    obs = {"state": np.array([0.5, 1.5])}
    obs["state"].flags.writeable = False  # as it comes from a message
    make_policy(flow_policy).infer(obs)
    assert obs.keys() == {"state"}


@pytest.mark.parametrize("real_time", [False, True])
def test_a_recorded_row_is_an_observation(flow_policy, real_time):
    """Its actions are not read, as openpi's transforms do not read them."""
    request = make_policy(flow_policy, real_time=real_time).prepare(OBS | {"actions": np.zeros((2, 7))})
    assert request.guidance is None
    np.testing.assert_array_equal(request.observation.state, make_policy(flow_policy).prepare(OBS).observation.state)


def test_any_sampler_can_be_served():
    """What chooses among candidates is a function of observations, draws and a plan."""

    class Constant:
        plan, action_shape = Plan(1, 1), (4, 3)

        def __call__(self, observation, draws, plan):
            return np.full((len(observation.state), 4, 3), 2.0), {}

    answer = make_policy(Constant(), metadata={"reset_pose": [0.0]})
    np.testing.assert_array_equal(answer.infer(OBS)["actions"][0], [7.000002, 10.000002, 13.000002])
    assert answer.metadata == {"reset_pose": [0.0]}
