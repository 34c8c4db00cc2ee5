from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acrlpd.models import gemma, paligemma, pi0, pi0_fast, siglip, weights
from acrlpd.types import Observation

# -- openpi's numbers --------------------------------------------------------------------------------------------------


def golden_model(golden, inputs, **changes):
    """openpi's tiny model with its parameters, in float32 unless ``changes`` say otherwise."""
    sizes = golden.meta["config"]
    fields = {
        "action_dim": sizes["action_dim"],
        "action_horizon": sizes["action_horizon"],
        "max_token_len": sizes["max_token_len"]["pi0fast"],
        "paligemma_variant": gemma.Config(**sizes["gemma"]["tiny"]),
        "vision_variant": golden.vision(),
        "vocab_size": sizes["vocab"],
        "cameras": tuple(sorted(name.removeprefix("image/") for name in inputs if name.startswith("image/"))),
        "dtype": "float32",
        "remat": False,
    }
    config = pi0_fast.Pi0FastConfig(**{**fields, **changes})
    policy = nnx.eval_shape(lambda: config.create(nnx.Rngs(0)))
    weights.load_into(policy, golden.arrays("pi0fast_params"))
    return policy


def forward(policy, observation, sampled_observation, sampled_tokens):
    """Every golden output; the logits of sampling are those behind openpi's own tokens."""
    tokens, valid, block_starts = policy.embed_inputs(observation)
    mask = pi0_fast.attention_mask(valid, block_starts)
    positions = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
    (outputs,), _ = policy.PaliGemma.llm([tokens], positions, mask)
    steps = sampled_tokens.shape[1]
    return {
        "tokens": tokens,
        "mask": valid,
        "ar_mask": block_starts,
        "attn_mask": mask,
        "logits": policy.PaliGemma.llm.logits(outputs),
        "loss": policy.compute_loss(jax.random.key(0), observation),
        "sample_greedy_8": policy.sample_actions(jax.random.key(1), sampled_observation, max_decoding_steps=steps),
        "sample_temperature1_key0_8": policy.sample_actions(
            jax.random.key(0), sampled_observation, max_decoding_steps=steps, temperature=1.0
        ),
        "sample_temperature1_key0_8_logits": forced_logits(policy, sampled_observation, sampled_tokens),
    }


def forced_logits(policy, observation, tokens):
    """Scores before each of the given tokens, decoded one after the other."""

    def step(carry, token):
        logits, decoding = carry
        return policy.decode(token, decoding), logits

    _, scores = jax.lax.scan(step, policy.prefill(observation, tokens.shape[1]), tokens.T)
    return jnp.swapaxes(scores, 0, 1)


@pytest.fixture(scope="module")
def computed(golden, jit):
    inputs, theirs = golden.arrays("pi0fast_inputs"), golden.arrays("pi0fast_outputs")
    observation = dataclasses.replace(
        golden.observation(inputs),
        token_ar_mask=jnp.asarray(inputs["token_ar_mask"]),
        token_loss_mask=jnp.asarray(inputs["token_loss_mask"]),
    )
    prompt_mask = jnp.asarray(theirs["sample_prompt_mask"])
    sampled = dataclasses.replace(
        observation,
        tokenized_prompt=jnp.where(prompt_mask, observation.tokenized_prompt, 0),
        tokenized_prompt_mask=prompt_mask,
        token_ar_mask=jnp.zeros_like(observation.token_ar_mask),
        token_loss_mask=None,
    )
    tokens = jnp.asarray(theirs["sample_temperature1_key0_8"], jnp.int32)
    graphdef, state = nnx.split(golden_model(golden, inputs))
    run = jit(lambda state, *arguments: forward(nnx.merge(graphdef, state), *arguments))
    return jax.device_get(run(state, observation, sampled, tokens)), theirs


@pytest.mark.golden
def test_every_golden_output_is_computed(computed):
    ours, theirs = computed
    assert ours.keys() == theirs.keys() - {"sample_prompt_mask"}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["mask", "ar_mask", "attn_mask", "sample_greedy_8", "sample_temperature1_key0_8"])
def test_masks_and_sampled_tokens_are_openpis(computed, name):
    ours, theirs = computed
    np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "atol"), [("tokens", 1e-5), ("logits", 5e-4), ("loss", 5e-4), ("sample_temperature1_key0_8_logits", 5e-4)]
)
def test_embeddings_logits_and_loss_are_openpis(computed, name, atol):
    ours, theirs = computed
    ours, theirs = ours[name], theirs[name]
    if name in ("tokens", "logits"):  # what stands at padding has no meaning
        valid = computed[1]["mask"]
        ours, theirs = ours[valid], theirs[valid]
    np.testing.assert_allclose(ours, theirs, atol=atol)


# -- parameter tables --------------------------------------------------------------------------------------------------

RELEASED = {
    "pi0_fast": pi0_fast.Pi0FastConfig(),
    "pi0_fast_lora": pi0_fast.Pi0FastConfig(paligemma_variant="gemma_2b_lora"),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(assert_released, name):
    assert_released(name, RELEASED[name])


# -- configuration -----------------------------------------------------------------------------------------------------


def test_config_defaults():
    config = pi0_fast.Pi0FastConfig()
    assert (config.action_dim, config.action_horizon, config.max_token_len) == (32, 32, 250)
    assert (config.image_size, config.vocab_size) == (224, 257_152)
    assert pi0_fast.Pi0FastConfig(image_size=28).vision.num_tokens == 4


def test_config_refuses_a_camera_named_twice():
    with pytest.raises(ValueError, match="cameras names one twice"):
        pi0_fast.Pi0FastConfig(cameras=("front", "front"))


# -- what must hold for any weights ------------------------------------------------------------------------------------

TINY = pi0_fast.Pi0FastConfig(
    action_dim=3,
    action_horizon=4,
    max_token_len=6,
    dtype="float32",
    paligemma_variant=gemma.Config(width=8, depth=2, mlp_dim=12, num_heads=4, num_kv_heads=2, head_dim=10),
    vision_variant=siglip.Config(image_size=4, patch_size=2, width=6, depth=2, mlp_dim=5, num_heads=2),
    vocab_size=11,
    cameras=("front", "wrist"),
    remat=False,
)
BATCH = 3
PROMPT = 3  # tokens of the text that are prompt; those behind are actions
STEPS = 4


def draw_observation(seed, config=TINY):
    """A prompt followed by action tokens, nothing masked."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, config.max_token_len)
    is_action = np.broadcast_to(np.arange(config.max_token_len) >= PROMPT, shape)
    observation = Observation(
        state=rng.normal(size=(BATCH, config.action_dim)).astype(np.float32),
        images={name: rng.integers(0, 256, (BATCH, 4, 4, 3), np.uint8) for name in config.cameras},
        image_masks={name: np.ones(BATCH, bool) for name in config.cameras},
        tokenized_prompt=rng.integers(0, config.vocab_size, shape, np.int32),
        tokenized_prompt_mask=np.ones(shape, bool),
        token_ar_mask=is_action.astype(np.int32),
        token_loss_mask=is_action,
    )
    return jax.tree.map(jnp.asarray, observation)


def prompt_only(observation):
    """As one has it when the actions are still to be found."""
    is_prompt = observation.token_ar_mask == 0
    return dataclasses.replace(
        observation,
        tokenized_prompt=jnp.where(is_prompt, observation.tokenized_prompt, 0),
        tokenized_prompt_mask=observation.tokenized_prompt_mask & is_prompt,
        token_ar_mask=None,
        token_loss_mask=None,
    )


@pytest.fixture(scope="module")
def policy(fill):
    return fill(lambda: TINY.create(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def run(policy, jit):
    """The loss, and the scores of the tokens that the actions are, decoded behind the prompt."""

    def loss_and_scores(observation):
        scores = forced_logits(policy, prompt_only(observation), observation.tokenized_prompt[:, PROMPT:])
        return policy.compute_loss(jax.random.key(0), observation), scores

    return jit(loss_and_scores)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), camera=st.sampled_from(TINY.cameras), length=st.integers(1, TINY.max_token_len))
def test_what_is_masked_cannot_matter(run, seed, camera, length):
    """Sample 1 has one camera masked and ``length`` tokens of text: the content of the rest may be anything."""
    observation, other = draw_observation(seed), draw_observation(seed + 1000)
    text_mask = observation.tokenized_prompt_mask.at[1, length:].set(False)
    observation = dataclasses.replace(
        observation,
        image_masks={**observation.image_masks, camera: jnp.array([True, False, True])},
        tokenized_prompt_mask=text_mask,
        token_loss_mask=observation.token_loss_mask & text_mask,
    )
    images = observation.images
    changed = dataclasses.replace(
        observation,
        images={**images, camera: images[camera].at[1].set(other.images[camera][1])},
        # Action tokens are what ``run`` feeds back, so only the prompt's padding may differ there.
        tokenized_prompt=jnp.where(
            text_mask | (observation.token_ar_mask == 1), observation.tokenized_prompt, other.tokenized_prompt
        ),
    )
    (loss, scores), (other_loss, other_scores) = run(observation), run(changed)
    np.testing.assert_allclose(loss, other_loss, atol=1e-5)
    np.testing.assert_allclose(scores, other_scores, atol=1e-4)
    unmasked = dataclasses.replace(changed, image_masks={})
    assert not np.allclose(run(observation)[1][1], run(unmasked)[1][1], atol=1e-4)


def test_state_is_seen_as_text_alone(run):
    observation = draw_observation(0)
    moved = dataclasses.replace(observation, state=observation.state + 1)
    jax.tree.map(np.testing.assert_array_equal, run(observation), run(moved))


def test_padding_behind_the_text_cannot_matter(run):
    observation, other = draw_observation(0), draw_observation(1)
    text_mask = observation.tokenized_prompt_mask.at[1, -2:].set(False)
    observation = dataclasses.replace(
        observation, tokenized_prompt_mask=text_mask, token_loss_mask=observation.token_loss_mask & text_mask
    )
    tokens = jnp.where(text_mask, observation.tokenized_prompt, other.tokenized_prompt)
    assert not np.array_equal(tokens, observation.tokenized_prompt)
    changed = dataclasses.replace(observation, tokenized_prompt=tokens)
    np.testing.assert_allclose(run(observation)[0], run(changed)[0], atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), sample=st.integers(0, BATCH - 1))
@example(seed=69, sample=1)  # losses of 2.454389 and 2.454267
def test_samples_of_a_batch_are_independent(run, seed, sample):
    """Changing one sample changes that one and no other."""
    observation = draw_observation(seed)
    changed = jax.tree.map(lambda a, b: a.at[sample].set(b[sample]), observation, draw_observation(seed + 1000))
    others = np.array([i for i in range(BATCH) if i != sample])
    pairs = list(zip(run(observation), run(changed), strict=True))
    for before, after in pairs:
        np.testing.assert_allclose(before[others], after[others], atol=1e-4)
        assert np.any(before[sample] != after[sample])
    # Two samples may have nearly one loss by chance, but not also one score for every token.
    assert not all(np.allclose(before[sample], after[sample], atol=1e-4) for before, after in pairs)


def test_decoding_with_a_cache_is_one_pass_over_everything(policy, jit):
    """Prompts of other lengths, a masked camera in front: each token sees the valid ones before it, one position on.

    The tokens are the greedy ones, so each must be the likeliest given those before.
    """
    observation = prompt_only(draw_observation(3))
    observation = dataclasses.replace(
        observation,
        image_masks={"front": jnp.array([True, False, True]), "wrist": jnp.ones(BATCH, bool)},
        tokenized_prompt_mask=observation.tokenized_prompt_mask.at[2, PROMPT - 1].set(False),
    )

    def both_ways(observation):
        generated = policy.sample_actions(jax.random.key(0), observation, max_decoding_steps=STEPS)
        prefix, valid, starts = policy.embed_inputs(observation)
        new = jnp.ones(generated.shape, bool)
        tokens = jnp.concatenate([prefix, policy.PaliGemma.llm.embed(generated)], axis=1)
        all_valid = jnp.concatenate([valid, new], axis=1)
        mask = pi0_fast.attention_mask(all_valid, jnp.concatenate([starts, new], axis=1))
        one_further = valid.sum(axis=1, keepdims=True) + 1 + jnp.arange(STEPS)[None]
        positions = jnp.concatenate([pi0.token_positions(valid), one_further], axis=1)
        (outputs,), _ = policy.PaliGemma.llm([tokens], positions, mask)
        return generated, valid, policy.PaliGemma.llm.logits(outputs), forced_logits(policy, observation, generated)

    generated, valid, logits, decoded = jit(both_ways)(observation)
    first = np.stack([scores[np.flatnonzero(row)[-1]] for scores, row in zip(logits, valid, strict=True)])
    p = valid.shape[1]
    in_one_pass = np.concatenate([first[:, None], logits[:, p : p + STEPS - 1]], axis=1)
    np.testing.assert_allclose(decoded, in_one_pass, atol=1e-4)
    np.testing.assert_array_equal(generated, in_one_pass.argmax(axis=-1))
    assert generated.dtype == jnp.int32
    assert len(np.unique(generated)) > 1


class Scripted(pi0_fast.Pi0Fast):
    """Says what it is told: tokens [b steps], whatever it is fed."""

    def __init__(self, script):
        self.script = script

    def prefill(self, observation, num_slots):
        nothing = jnp.zeros((1, 1, 1, 1, 1))
        decoding = pi0_fast.Decoding((nothing, nothing), jnp.ones((1, 1), bool), jnp.int32(0))
        return self._logits(0), decoding

    def decode(self, token, decoding):
        step = decoding.num_generated + 1
        return self._logits(step), dataclasses.replace(decoding, num_generated=step)

    def _logits(self, step):
        return jax.nn.one_hot(jnp.asarray(self.script)[:, step], TINY.vocab_size)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([[5, 1, 7, 8], [6, 1, 7, 8]], [[5, 1, 0, 0], [6, 1, 0, 0]]),  # all end at once
        ([[1, 5, 7, 8], [6, 1, 7, 8]], [[1, 5, 7, 8], [6, 1, 7, 8]]),  # one after the other is never all at once
        ([[5, 6, 7, 8], [5, 6, 7, 8]], [[5, 6, 7, 8], [5, 6, 7, 8]]),  # nobody ends
    ],
)
def test_decoding_stops_when_all_end_at_once(script, expected):
    observation = prompt_only(draw_observation(0))
    tokens = Scripted(nnx.data(script)).sample_actions(jax.random.key(0), observation, max_decoding_steps=4)
    np.testing.assert_array_equal(tokens, expected)


def test_token_loss_by_hand():
    """Scores (0, log 3) give the second of two tokens a chance of 3/4; the last sample has no token to learn."""
    logits = jnp.broadcast_to(jnp.array([0.0, np.log(3.0)]), (3, 2, 2))
    targets = jnp.array([[1, 0], [1, 0], [1, 0]])
    mask = jnp.array([[True, True], [False, True], [False, False]])
    expected = [(np.log(4 / 3) + np.log(4)) / 2, np.log(4), 0.0]
    np.testing.assert_allclose(pi0_fast.token_loss(logits, targets, mask), expected, rtol=1e-6)


def test_attention_of_prompt_and_actions_by_hand():
    """Two prompt tokens, two actions; in the second sample the first token is padding and there is one action."""
    valid = jnp.array([[True, True, True, True], [False, True, True, True]])
    starts = jnp.array([[False, False, True, True], [False, False, False, True]])
    mask = pi0_fast.attention_mask(valid, starts)
    np.testing.assert_array_equal(mask[0], [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(mask[1], [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])


def test_bfloat16_keeps_the_cache_in_it_and_logits_in_the_tables_dtype(fill):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    policy = fill(lambda: config.create(nnx.Rngs(0)))
    observation = prompt_only(draw_observation(0))
    logits, decoding = nnx.eval_shape(lambda p, o: p.prefill(o, 2), policy, observation)
    assert {x.dtype.name for x in decoding.cache} == {"bfloat16"}
    assert logits.dtype == jnp.float32
    shapes = [x.shape for x in decoding.cache]
    assert shapes == [(2, BATCH, 2 * config.vision.num_tokens + config.max_token_len + 2, 2, 10)] * 2


def test_queries_stay_in_float32_only_where_asked(fill, jit):
    """In bfloat16 the attention of pi0-FAST differs from that of pi0 by the rounding of rotated queries."""
    config = TINY.paligemma
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(1, 6, config.width)), jnp.bfloat16)
    positions, mask = jnp.arange(6)[None], jnp.ones((1, 6, 6), bool)

    def attend(wide):
        make = lambda: gemma.Attention([config], float32_queries=wide, param_dtype="float32", rngs=nnx.Rngs(0))  # noqa: E731
        layer = fill(make)
        rotation = gemma.rotation(positions, config.head_dim)
        (outputs,) = jit(lambda x: layer([x], *layer.queries_keys_values([x], rotation), mask, None))(tokens)
        return outputs

    narrow, wide = attend(False), attend(True)
    assert narrow.dtype == wide.dtype == jnp.bfloat16
    assert not np.array_equal(narrow, wide)
    np.testing.assert_allclose(narrow.astype("float32"), wide.astype("float32"), atol=0.05)


def test_what_the_model_needs_is_named(policy):
    observation = draw_observation(0)
    with pytest.raises(ValueError, match=r"lacks the cameras \['wrist'\]; it has \['front'\]"):
        policy.PaliGemma.preprocess(dataclasses.replace(observation, images={"front": observation.images["front"]}))
    with pytest.raises(ValueError, match="needs tokenized_prompt and tokenized_prompt_mask"):
        policy.embed_inputs(dataclasses.replace(observation, tokenized_prompt=None))
    with pytest.raises(ValueError, match="tokenize the prompts with their actions"):
        policy.compute_loss(jax.random.key(0), dataclasses.replace(observation, token_loss_mask=None))


def test_augmentation_takes_the_key_itself(policy, monkeypatch):
    """Not a split of it, as in pi0; and only in training."""
    rng, seen = jax.random.key(5), []

    def augment(key, cameras):
        seen.append(key)
        return cameras

    monkeypatch.setattr(paligemma.images, "augment", augment)
    for train in (False, True):
        jax.eval_shape(lambda o, train=train: policy.compute_loss(rng, o, train=train), draw_observation(0))
    assert seen == [rng]


@pytest.mark.slow
def test_fresh_model_trains(jit):
    """From scratch, one gradient step on a fixed batch lowers the loss; all of the language model has a gradient."""
    config = dataclasses.replace(TINY, remat=True)
    observation = draw_observation(0)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: config.create(nnx.Rngs(0))))
    params = jit(lambda: nnx.state(config.create(nnx.Rngs(0))))()

    def mean_loss(params):
        return nnx.merge(graphdef, params).compute_loss(jax.random.key(0), observation).mean()

    loss_and_gradient = jit(jax.value_and_grad(mean_loss))
    before, gradient = loss_and_gradient(params)
    after, _ = loss_and_gradient(jax.tree.map(lambda value, slope: value - 1e-3 * slope, params, gradient))
    assert after < before
    assert all(np.any(x) for path, x in weights.flatten(nnx.merge(graphdef, gradient)).items() if "/llm/" in path)
