"""Samples that the critics' gradient guides: what each candidate becomes, which critics guide, and at which scale."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.agents import agent as agent_module
from acrlpd.agents import candidates, losses
from acrlpd.agents.extraction import BestOfN, GuidedByQ
from acrlpd.agents.losses import LossWeights
from acrlpd.models import flow, gemma, lora
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.types import Observation

CHOICES = {"extraction": "guided", "guidance_weights": (0.0, 2.0)}


def with_scale(agent, scale=0.5):
    return dataclasses.replace(agent, q_scale=jnp.float32(scale))


@pytest.fixture(scope="module")
def agent(toys):
    return with_scale(toys.agent(toys.config(**CHOICES)))


@pytest.fixture(scope="module")
def noise(toys):
    return jax.random.normal(toys.key(0), (5, 6, 3, 2))


@pytest.fixture(scope="module")
def prefix(agent, toys):
    return agent.acting_modules().policy.encode(toys.batch().observations)


def propose(agent, prefix, noise, **changes):
    """Candidates and their values, with the strategy "parallel" unless another is named."""
    config = dataclasses.replace(agent.config, **{"best_of_n_strategy": "parallel", **changes})
    return candidates.propose(agent.acting_modules(), config, prefix, noise, 3)


def by_hand(agent, prefix, noise, weights, *, num_steps=3):
    """The sampler in a loop, with gradients of each single value and no masks."""
    modules = agent.acting_modules()
    target = agent.guided(modules).guide.critic
    x = noise
    for step in range(num_steps):
        t = 1 - step / num_steps
        v = modules.policy.velocity(prefix, x, jnp.full(x.shape[:2], t, jnp.float32))
        clean = x - t * v
        g = jax.grad(lambda a: target(prefix.features, prefix.state, a).min(axis=0).sum())(clean)
        x = x - (v - np.reshape(weights, (-1, 1, 1, 1)) * g / agent.q_scale) / num_steps
    return x


def test_candidates_take_the_weights_in_turn(agent, prefix, noise):
    chunks, scores = propose(agent, prefix, noise)
    np.testing.assert_allclose(chunks, by_hand(agent, prefix, noise, [0, 2, 0, 2, 0]), atol=1e-5)
    plain, _ = propose(agent, prefix, noise, extraction="best_of_n")
    np.testing.assert_array_equal(chunks[::2], plain[::2])  # the weight 0 is a plain sample, bit for bit
    assert np.abs(chunks[1::2] - plain[1::2]).max() > 1e-2
    critic = agent.acting_modules().critic
    np.testing.assert_allclose(scores, critic(prefix.features, prefix.state, chunks).min(axis=0), atol=1e-5)


def test_following_the_gradient_raises_the_value(agent, prefix, noise):
    values = [propose(agent, prefix, noise, guidance_weights=(weight,))[1].mean() for weight in (0.0, 0.3, 1.0)]
    assert values == sorted(values)
    assert values[2] - values[0] > 0.1


@pytest.mark.parametrize("strategy", ["chunked", "sequential", "auto"])
def test_blocks_give_the_same_candidates(strategy, agent, prefix, noise):
    chunks, scores = propose(agent, prefix, noise)
    blocks = {"best_of_n_strategy": strategy, "best_of_n_block": 2, "best_of_n_bytes": 4000}
    in_blocks, their_scores = propose(agent, prefix, noise, **blocks)
    np.testing.assert_allclose(in_blocks, chunks, atol=1e-5)
    np.testing.assert_array_equal(np.argmax(their_scores, axis=0), np.argmax(scores, axis=0))


def test_the_chosen_candidate_is_drawn_again_with_its_own_weight(agent, prefix, noise):
    config = dataclasses.replace(agent.config, candidate_flow_steps=1)
    chosen = candidates.choose(agent.acting_modules(), config, prefix, noise, 3)
    expected = by_hand(agent, prefix, noise, [0, 2, 0, 2, 0])[chosen.index, np.arange(6)]
    np.testing.assert_allclose(chosen.chunk, expected, atol=1e-5)
    assert set(np.asarray(chosen.index % 2).tolist()) == {0, 1}  # some follow a gradient, some do not
    np.testing.assert_array_equal(chosen.values["guidance_weight"], 2.0 * (chosen.index % 2))


PI0 = {
    "action_dim": 3,
    "state_dim": 4,
    "action_horizon": 3,
    "paligemma_variant": "nano",
    "vision_variant": "nano",
    "action_expert_variant": "nano_expert",
    "cameras": ("base_0_rgb",),
    "image_size": 16,
    "max_token_len": 4,
    "vocab_size": 16,
    "dtype": "float32",
    "remat": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pi0", "pi05", "pi0 with adapters"])
def test_openpis_models_are_guided(model, toys):
    """The weight 0 changes nothing, and the guide's own value of the others rises."""
    sizes = PI0
    if model == "pi0 with adapters":
        adapter = lora.Config(rank=2, alpha=2.0)
        with_adapters = dataclasses.replace(gemma.get_config("nano"), attention_lora=adapter, mlp_lora=adapter)
        sizes = PI0 | {"paligemma_variant": with_adapters, "action_expert_variant": with_adapters}
    policy = Pi0Config(**sizes, pi05=model == "pi05").create(nnx.Rngs(0))
    config = toys.config(extraction="guided", guidance_weights=(0.0, 0.3), critic={"q_aggregation": "mean"})
    agent = with_scale(toys.agent(config, policy=policy, action_dim=2, trainable=Pi0.is_suffix_param))
    rng = np.random.default_rng(0)
    observations = Observation(
        state=jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
        images={"base_0_rgb": jnp.asarray(rng.integers(0, 256, (2, 16, 16, 3)), jnp.uint8)},
        image_masks={"base_0_rgb": jnp.ones(2, bool)},
        tokenized_prompt=jnp.asarray(rng.integers(0, 16, (2, 4)), jnp.int32),
        tokenized_prompt_mask=jnp.ones((2, 4), bool),
    )
    noise = jax.random.normal(toys.key(0), (4, 2, 3, 3))

    @toys.jit
    def sampled(agent):
        modules = agent.acting_modules()
        prefix = flow.encode(modules.policy, observations)
        plain = flow.sample(modules.policy, prefix, noise, num_steps=3)
        chunks = candidates.propose(modules, agent.config, prefix, noise, 3)[0]
        guide = agent.guided(modules).guide.critic
        return [(each, guide(prefix.features, prefix.state, each)) for each in (plain, chunks)]

    (plain, before), (guided, after) = sampled(agent)
    np.testing.assert_allclose(guided[::2], plain[::2], atol=1e-5)
    assert (after - before).mean(axis=0)[1::2].mean() > 1e-3


def test_padding_gets_no_guidance(toys):
    """The third of three action dimensions is the model's padding. Without a velocity it stays what it was."""
    agent = with_scale(toys.agent(toys.config(**CHOICES), policy=toys.policy(3), action_dim=2))
    still = jax.tree.map(jnp.zeros_like, agent.params["policy"])
    modules = dataclasses.replace(agent, params=agent.params | {"policy": still}).acting_modules()
    prefix = modules.policy.encode(toys.batch().observations)
    noise = jax.random.normal(toys.key(1), (2, 6, 3, 3))
    chunks = GuidedByQ(3, None).propose(
        dataclasses.replace(modules, guide=dataclasses.replace(modules.guide, weights=jnp.full((2, 1), 2.0))),
        prefix,
        noise,
    )
    np.testing.assert_array_equal(chunks[..., 2], noise[..., 2])
    assert np.abs(chunks - noise)[..., :2].min() > 0


def test_a_weight_means_the_same_at_any_scale_of_q(agent, prefix, noise):
    def tenfold(critic):
        return critic | {"out": jax.tree.map(lambda x: 10 * x, critic["out"])}

    larger = dataclasses.replace(agent, target_critic=tenfold(agent.target_critic), q_scale=10 * agent.q_scale)
    np.testing.assert_allclose(propose(larger, prefix, noise)[0], propose(agent, prefix, noise)[0], atol=1e-5)
    unknown = with_scale(agent, 0.0)
    plain, _ = propose(agent, prefix, noise, extraction="best_of_n")
    np.testing.assert_array_equal(propose(unknown, prefix, noise)[0], plain)


def test_clean_chunks_are_clipped_before_the_gradient_is_taken(agent, prefix, noise, monkeypatch):
    seen = []
    given = flow.guided_velocity

    def spy(v_t, x_t, time, climb):
        def gradient(clean):
            seen.append(clean)
            return climb.gradient(clean)

        return given(v_t, x_t, time, dataclasses.replace(climb, gradient=gradient))

    monkeypatch.setattr(flow, "guided_velocity", spy)
    with jax.disable_jit():
        chunks = GuidedByQ(2, 0.5).propose(agent.acting_modules(), prefix, noise)
    assert len(seen) == 2
    assert {float(jnp.abs(each).max()) for each in (*seen, chunks)} == {0.5}


# -- which critics guide -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"act_by_target_critic": True}, {"policy_ema_decay": 0.5}], ids=str)
def test_target_critics_guide_whoever_chooses(choices, toys):
    """Of one candidate, which nobody chooses, the chunk follows the target critics alone."""
    agent = with_scale(toys.agent(toys.config(extraction="guided", **choices)))

    def act(agent, n=1):
        agent = dataclasses.replace(agent, opt_state={})
        return agent_module.choose_chunks(agent, Observation(state=jnp.ones((5, 4))), toys.key(2), num_samples=n)

    chunks = act(agent)[0]
    zeros = jax.tree.map(jnp.zeros_like, agent.params["critic"])
    newest = dataclasses.replace(
        agent, params=agent.params | {"critic": zeros}, ema=agent.ema and agent.ema | {"critic": zeros}
    )
    np.testing.assert_array_equal(act(newest)[0], chunks)
    assert np.abs(act(dataclasses.replace(agent, target_critic=zeros))[0] - chunks).max() > 1e-3
    for before, after in zip(act(agent, 3), act(agent.acting_only(), 3), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)


def test_networks_without_a_guide_are_refused(agent, prefix, noise):
    modules = agent.nets.modules(agent.params, agent.frozen)
    with pytest.raises(ValueError, match="no guide"):
        GuidedByQ(3, None).propose(modules, prefix, noise)


# -- the update --------------------------------------------------------------------------------------------------------


def program(toys, **choices):
    """The program of an update, in which every number of the configuration is written."""
    agent = toys.agent(toys.config(**choices))
    update = agent_module._update.__wrapped__
    return str(jax.make_jaxpr(update)(agent, toys.batch(), toys.key(0), LossWeights()))


def test_an_update_is_that_of_best_of_n_unless_the_target_is_guided_too(toys):
    plain = program(toys)
    assert program(toys, **CHOICES) == plain
    assert program(toys, **CHOICES, target_guidance=True) != plain


def test_a_guided_target_moves_the_critics_alone(toys):
    """And the target that they move to is the value of the guided chunk."""
    agent = with_scale(toys.agent(toys.config(**CHOICES, target_guidance=True, target_samples=2)))
    only = LossWeights(critic_weight=1.0, actor_weight=0.0, bc_weight=0.0, alpha_weight=0.0)
    after, metrics = toys.update(agent, toys.batch(), toys.key(0), only)
    assert {group for group in agent.params if metrics[f"grad_norm/{group}"] != 0} == {"critic"}
    plain = dataclasses.replace(agent, q_scale=jnp.zeros(()))  # no guidance yet
    other, other_metrics = toys.update(plain, toys.batch(), toys.key(0), only)
    assert abs(metrics["target_q_mean"] - other_metrics["target_q_mean"]) > 1e-3
    np.testing.assert_allclose(other.q_scale, other_metrics["q_abs_mean"], rtol=1e-6)
    np.testing.assert_allclose(after.q_scale, metrics["q_abs_mean"], rtol=1e-6)  # the first update counts in full


def test_scale_of_q_by_hand():
    """The mean of 2, 4, 6; later a hundredth of the difference; at once where there was none."""
    scale = jnp.zeros(())
    for step, q in enumerate((2.0, 4.0, 6.0)):
        scale = losses.q_scale(scale, jnp.float32(q), jnp.int32(step))
    np.testing.assert_allclose(scale, 4.0)
    np.testing.assert_allclose(losses.q_scale(scale, jnp.float32(5.0), jnp.int32(10_000)), 4.01, rtol=1e-6)
    np.testing.assert_allclose(losses.q_scale(jnp.zeros(()), jnp.float32(5.0), jnp.int32(10_000)), 5.0)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_weights_are_asked_for_with_guided_alone(agent, toys):
    other = agent.with_extraction(None, (3.0,))
    assert other.config.weights_of_candidates(2) == (3.0, 3.0)
    best_of_n = agent.with_extraction("best_of_n")
    assert best_of_n.config.weights_of_candidates(2) is None
    assert best_of_n.with_extraction("guided", (0.0, 1.0, 2.0)).config.weights_of_candidates(4) == (0, 1, 2, 0)
    with pytest.raises(ValueError, match=r"guidance_weights \(3.0,\) have no effect with extraction 'best_of_n'"):
        best_of_n.with_extraction(None, (3.0,))
    with pytest.raises(ValueError, match=r"running mean of \|Q\|, which this checkpoint does not have"):
        with_scale(best_of_n, 0.0).with_extraction("guided")


@pytest.mark.parametrize("weights", [(), (-1.0,), (float("inf"),), (float("nan"),)])
def test_weights_are_numbers_from_zero(weights, toys):
    with pytest.raises(ValueError, match=r"guidance_weights(\[\d\])? must be"):
        toys.config(guidance_weights=weights)


def test_it_trains_nothing_beyond_imitation(agent, prefix, noise):
    assert GuidedByQ.actor_loss is BestOfN.actor_loss
    assert agent.config.actor_draws == 1
