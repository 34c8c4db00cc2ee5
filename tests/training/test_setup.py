"""What a configuration asks for is what a run is built from."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from acrlpd.config import CollectConfig
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.envs.env import EnvConfig, EnvSpec
from acrlpd.serving.policy import AgentSampler, Policy
from acrlpd.training import build, loading, prior_data, setup
from acrlpd.types import Episode


def policy_arrays(agent):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(agent.params["policy"])]


def with_policy(config, **changes):
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, **changes))


def test_training_starts_from_the_weights_asked_for(finished, tiny_config, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(setup.run_files(finished.config).checkpoints / "8" / "params", weights)
    config = with_policy(dataclasses.replace(tiny_config, seed=5), weights=str(weights))
    trainer = setup.make_trainer(config)
    for ours, theirs in zip(policy_arrays(trainer.agent), policy_arrays(finished.agent), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_of_another_size_are_refused(finished, tiny_config):
    weights = str(setup.run_files(finished.config).directory)
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        setup.make_trainer(with_policy(tiny_config, weights=weights, hidden_dims=(8,)))


def test_another_models_tokenizer_is_refused(tiny_config):
    dims = build.Dims(4, 2)
    with pytest.raises(ValueError, match="has 512 pieces, but the model's vocabulary has 100"):
        build.make_transform(with_policy(tiny_config, kind="pi0", vocab_size=100), {}, dims)
    with pytest.raises(ValueError, match=r"paligemma_tokenizer.model.*--policy.tokenizer"):
        build.create_agent(with_policy(tiny_config, kind="pi0", vocab_size=257_152), dims, (), weights="pi0")


def test_data_of_another_robot_than_the_environments_is_refused(tiny_config):
    low = -np.ones(4)
    spec = EnvSpec("metaworld/drawer-open-v3", "open", 39, 4, low, -low, 100, (), 64, 50.0, -1.0)
    with pytest.raises(
        ValueError, match="has 4 state and 2 action dimensions, but metaworld/drawer-open-v3 has 39 and 4"
    ):
        prior_data.check_prior(tiny_config, EpisodeStore(), build.Dims(4, 2), spec, "data")
    fitting = dataclasses.replace(spec, state_dim=4, action_dim=2)
    prior_data.check_prior(tiny_config, EpisodeStore(), build.Dims(4, 2), fitting, "data")


def test_a_checkpoint_needs_neither_the_weights_it_started_from_nor_an_environment(tiny_config, tmp_path):
    """A policy whose cameras come from the data alone."""
    rng = np.random.default_rng(0)
    episode = Episode(
        state=rng.normal(size=(6, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(6, 2)).astype(np.float32),
        rewards=np.full(6, -1, np.float32),
        terminals=np.zeros(6, bool),
        task="push the button",
        images={"top": rng.integers(0, 256, (6, 16, 16, 3), np.uint8)},
        success=False,
    )
    hdf5.write_episode(hdf5.episode_path(tmp_path / "pictures", 0), episode)
    config = with_policy(
        dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, path=str(tmp_path / "pictures"))),
        kind="pi0",
        paligemma_variant="nano",
        action_expert_variant="nano_expert",
        vision_variant="nano",
        max_token_len=8,
        image_size=16,
        dtype="float32",
    )
    trainer = setup.make_trainer(config)
    trainer.save()
    trainer.parts.checkpoints.wait()
    loaded = loading.load_checkpoint(setup.run_files(config).directory)
    for ours, theirs in zip(policy_arrays(loaded.agent), policy_arrays(trainer.agent), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_data_options_hold_for_collected_episodes_too(tiny_config):
    config = dataclasses.replace(
        tiny_config,
        env=EnvConfig("metaworld/drawer-open-v3"),
        data=dataclasses.replace(
            tiny_config.data,
            path=None,
            collect=CollectConfig(episodes=4),  # all there: nothing is collected
            rewards=RewardConfig(source="sparse", convention="0/1"),
        ),
    )
    shutil.copytree(tiny_config.data.path, setup.run_files(config).directory / "prior")
    source = prior_data.open_prior(config)
    rewards = [source.window(index, "rewards", 0, int(length)) for index, length in enumerate(source.lengths)]
    assert [(each[:-1].any(), each[-1]) for each in rewards] == [(False, 1), (False, 0), (False, 1), (False, 0)]


def test_a_trained_agent_can_be_served(finished):
    policy = Policy(AgentSampler(finished.agent), finished.parts.transform, rng=jax.random.key(3))
    observation = {"state": np.array([0.1, -0.2, 0.3, 0.0], np.float32), "prompt": "push the button"}
    answer = policy.infer({**observation})
    assert answer["actions"].shape == (finished.config.policy.action_horizon, 2)
    assert np.isfinite(answer["actions"]).all()
    again = Policy(AgentSampler(finished.agent), finished.parts.transform, rng=jax.random.key(3)).infer({**observation})
    np.testing.assert_array_equal(answer["actions"], again["actions"])
    with pytest.raises(ValueError, match="takes no noise"):
        policy.infer({**observation}, noise=np.zeros((3, 2), np.float32))


def test_equal_configurations_share_compiled_programs_and_others_do_not(finished, tiny_config):
    """Another agent of the same networks needs no compilation; another learning rate or discount is another program."""
    networks = build.make_agent(tiny_config, build.Dims(4, 2), ()).nets
    assert networks == finished.agent.nets
    assert networks is not finished.agent.nets
    assert hash(networks) == hash(finished.agent.nets)
    schedule = dataclasses.replace(tiny_config.optimizers.critic.schedule, peak_lr=1.0)
    critic = dataclasses.replace(tiny_config.optimizers.critic, schedule=schedule)
    for other in (
        dataclasses.replace(tiny_config, optimizers=dataclasses.replace(tiny_config.optimizers, critic=critic)),
        dataclasses.replace(tiny_config, agent=dataclasses.replace(tiny_config.agent, discount=0.5)),
    ):
        assert build.make_agent(other, build.Dims(4, 2), ()).nets != networks


def abstract_agent(config, **policy):
    """The shapes and dtypes of a full-size agent: nothing is computed."""
    config = with_policy(config, kind="pi0", vocab_size=1024, **policy)
    return jax.eval_shape(lambda: build.create_agent(config, build.Dims(4, 2), ("top",)))


def paths(params):
    return {"/".join(map(str, path)) for path in flatten_dict(params)}


FREEZING = {
    "backbone": {"freeze_pi0_backbone": True},
    "lora": {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"},
    "lora_of_one": {"paligemma_variant": "gemma_2b_lora"},
    "both": {"freeze_pi0_backbone": True, "action_expert_variant": "gemma_300m_lora"},
}
BACKBONE_KERNEL = "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
BASES = {expert: f"PaliGemma/llm/layers/mlp{expert}/linear" for expert in ("", "_1")}
ADAPTERS = {expert: f"{base}_lora_a" for expert, base in BASES.items()}


@pytest.mark.parametrize(
    ("name", "frozen", "trained"),
    [
        ("backbone", {BACKBONE_KERNEL, BASES[""]}, {BASES["_1"], "action_in_proj/kernel"}),
        ("lora", {*BASES.values()}, {*ADAPTERS.values(), BACKBONE_KERNEL, "action_in_proj/kernel"}),
        ("lora_of_one", {BASES[""]}, {ADAPTERS[""], BASES["_1"], BACKBONE_KERNEL}),
        ("both", {*BASES.values(), BACKBONE_KERNEL}, {ADAPTERS["_1"], "action_in_proj/kernel"}),
    ],
)
def test_what_is_frozen_takes_half_the_memory_and_no_optimizer(tiny_config, name, frozen, trained):
    agent = abstract_agent(tiny_config, frozen_dtype="bfloat16", **FREEZING[name])
    params, moments = agent.params["policy"], agent.opt_state["policy"][1][0]
    assert frozen <= paths(agent.frozen)
    assert trained <= paths(params)
    assert not paths(params) & paths(agent.frozen)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(agent.frozen)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    for moment in (moments.mu, moments.nu):
        assert paths(moment) == paths(params)


def test_frozen_parameters_stay_in_float32_unless_asked(tiny_config):
    agent = abstract_agent(tiny_config, freeze_pi0_backbone=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(agent.frozen)} == {"float32"}


def test_a_dtype_for_frozen_parameters_needs_some(tiny_config):
    with pytest.raises(ValueError, match="no parameter is frozen"):
        with_policy(tiny_config, frozen_dtype="bfloat16")
