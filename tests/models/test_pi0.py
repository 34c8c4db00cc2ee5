from __future__ import annotations

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.models import flow, gemma, images, pi0, siglip, weights
from acrlpd.types import Observation

MODELS = ("pi0", "pi05", "pi0_lora")
PRECISIONS = {"f32": ("float32", "float32"), "bf16": ("bfloat16", "float32"), "bf16params": ("bfloat16", "bfloat16")}
SAMPLES = ("sample_1", "sample_5", "sample_10")
KEYED = ("loss_key7", "loss_key7_train", "sample_10_key3", "sample_5_odd_images")


# -- openpi's numbers --------------------------------------------------------------------------------------------------


def forward(policy, observation, odd_observation, inputs):
    """Every golden output of one model; what the caller drops is not computed."""
    x_t, time, noise, actions = (inputs[name] for name in ("x_t", "time", "noise", "actions"))
    unused = jax.random.key(0)
    tokens, mask, starts = policy.embed_prefix(observation)
    suffix_tokens, suffix_mask, suffix_starts, condition = policy.embed_suffix(observation.state, x_t, time)
    joint_mask = jnp.concatenate([mask, suffix_mask], axis=1)
    seen = pi0.attention_mask(joint_mask, jnp.concatenate([starts, suffix_starts]))
    positions = pi0.token_positions(joint_mask)
    (prefix_out, suffix_out), _ = policy.PaliGemma.llm([tokens, suffix_tokens], positions, seen, [None, condition])
    prefix = policy.encode(observation)
    outputs = {
        "prefix_tokens": tokens,
        "prefix_mask": mask,
        "prefix_ar_mask": starts,
        "suffix_tokens": suffix_tokens,
        "suffix_mask": suffix_mask,
        "suffix_ar_mask": suffix_starts,
        "attn_mask": seen,
        "positions": positions,
        "prefix_out": prefix_out,
        "suffix_out": suffix_out,
        "v_t": policy.action_out_proj(suffix_out[:, -x_t.shape[1] :]),
        "cache_k": prefix.cache[0],
        "cache_v": prefix.cache[1],
        "v_t_cached": policy.velocity(prefix, x_t[None], time[None])[0],
        "loss": policy.compute_loss(unused, observation, actions, noise=noise, time=time),
        "loss_key7": policy.compute_loss(jax.random.key(7), observation, actions),
        "loss_key7_train": policy.compute_loss(jax.random.key(7), observation, actions, train=True),
        "sample_10_key3": policy.sample_actions(jax.random.key(3), observation),
    }
    if condition is not None:
        outputs["adarms_cond"] = condition
    if odd_observation is not None:
        outputs["sample_5_odd_images"] = policy.sample_actions(unused, odd_observation, num_steps=5, noise=noise)
    for name in SAMPLES:
        steps = int(name.removeprefix("sample_"))
        outputs[name] = policy.sample_actions(unused, observation, num_steps=steps, noise=noise)
    return outputs


@pytest.fixture(scope="module")
def computed(golden, jit):
    """Our outputs for a golden model and precision, and openpi's; each is computed once."""
    cache = {}

    def compute(model, precision):
        if (model, precision) not in cache:
            dtype, param_dtype = PRECISIONS[precision]
            policy = golden.model(model, dtype=dtype, param_dtype=param_dtype)
            inputs, outputs = golden.arrays(f"{model}_inputs"), golden.arrays(f"{model}_outputs")
            odd = {name.removeprefix("odd_images/"): value for name, value in outputs.items() if "odd_images/" in name}
            observation = golden.observation(inputs)
            odd_observation = observation.replace(images=jax.tree.map(jnp.asarray, odd)) if odd else None
            theirs = golden.group(f"{model}_outputs", f"{precision}/")
            graphdef, state = nnx.split(policy)

            def run(state, *arguments):
                ours = forward(nnx.merge(graphdef, state), *arguments)
                return {name: value for name, value in ours.items() if name in theirs}

            cache[model, precision] = jax.device_get(jit(run)(state, observation, odd_observation, inputs)), theirs
        return cache[model, precision]

    return compute


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_masks_and_positions_are_openpis(computed, model):
    ours, theirs = computed(model, "f32")
    for name in ("prefix_mask", "prefix_ar_mask", "suffix_mask", "suffix_ar_mask", "attn_mask", "positions"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_embeddings_and_cache_are_openpis(computed, model):
    ours, theirs = computed(model, "f32")
    names = {"prefix_tokens", "suffix_tokens", "adarms_cond"} & theirs.keys()
    assert ("adarms_cond" in names) == (model == "pi05")
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
    for name in ("cache_k", "cache_v"):  # these went through a layer
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-5, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_joint_pass_is_openpis(computed, model):
    ours, theirs = computed(model, "f32")
    valid = theirs["prefix_mask"]
    np.testing.assert_allclose(ours["prefix_out"][valid], theirs["prefix_out"][valid], atol=5e-4)
    for name in ("suffix_out", "v_t"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-4, err_msg=name)
    np.testing.assert_allclose(ours["v_t_cached"], ours["v_t"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_velocity_loss_and_samples_are_openpis(computed, model):
    ours, theirs = computed(model, "f32")
    for name in ("v_t_cached", "loss", *SAMPLES):
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-4, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_draws_augmentation_and_odd_image_sizes_are_openpis(computed, model):
    ours, theirs = computed(model, "f32")
    for name in KEYED:
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-4, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_noise_and_time_of_a_key_are_openpis(golden, model):
    outputs = golden.group(f"{model}_outputs", "f32/")
    _, noise_rng, time_rng = jax.random.split(jax.random.key(7), 3)
    noise = outputs["loss_key7_noise"]
    # Bit for bit, so not with the tests' faster compilation, which rounds erf_inv otherwise.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    options["xla_cpu_use_fusion_emitters"] = True
    normal = jax.jit(lambda key: jax.random.normal(key, noise.shape), compiler_options=options)
    np.testing.assert_array_equal(normal(noise_rng), noise)
    np.testing.assert_allclose(flow.sample_time(time_rng, noise.shape[:1]), outputs["loss_key7_time"], atol=1e-6)


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16params"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_bfloat16_drifts_no_more_than_twice_openpis(golden, computed, model, precision):
    ours, _ = computed(model, precision)
    exact = golden.group(f"{model}_outputs", "f32/")
    drifts = {
        name: drift for name, drift in golden.meta[model]["bf16_drift"].items() if name.startswith(f"{precision}/")
    }
    assert drifts
    for name, allowed in drifts.items():
        drift = np.abs(ours[name.split("/")[1]].astype("float32") - exact[name.split("/")[1]])
        assert drift.max() <= 2 * allowed["max_abs"], name
        assert drift.mean() <= 2 * allowed["mean_abs"], name


@pytest.mark.golden
@pytest.mark.parametrize("size", [32, 1024])
def test_time_embedding_is_openpis(golden, size):
    arrays = golden.group("functions", "posemb/")
    np.testing.assert_allclose(pi0.embed_time(jnp.asarray(arrays["time"]), size), arrays[f"out_{size}"], atol=1e-5)


@pytest.mark.golden
def test_attention_mask_is_openpis(golden):
    arrays = golden.group("functions", "mask/")
    cases = [name.removeprefix("ar_") for name in arrays if name.startswith("ar_")]
    assert cases
    for case in cases:
        mask = pi0.attention_mask(jnp.asarray(arrays["valid"]), jnp.asarray(arrays[f"ar_{case}"]))
        np.testing.assert_array_equal(mask, arrays[f"out_{case}"])


# -- gradients and training --------------------------------------------------------------------------------------------


def split_trainable(policy):
    """Graph, trainable and frozen parameters."""
    return nnx.split(policy, lambda path, _: not policy.config.freezes("/".join(map(str, path))), ...)


def mean_loss_and_gradient(graphdef, jit):
    def mean_loss(trainable, frozen, rng, observation, actions, noise, time):
        policy = nnx.merge(graphdef, trainable, frozen)
        return policy.compute_loss(rng, observation, actions, noise=noise, time=time).mean()

    return jit(jax.value_and_grad(mean_loss))


def by_path(state):
    return {"/".join(map(str, path)): np.asarray(param.get_value()) for path, param in nnx.to_flat_state(state)}


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_openpis(golden, jit, model):
    """Every array, in the norm of its difference; and the same with activations computed again."""
    policy = golden.model(model, remat=model == "pi05")
    inputs, outputs = golden.arrays(f"{model}_inputs"), golden.group(f"{model}_outputs", "f32/")
    graphdef, everything = nnx.split(policy)
    loss, gradient = mean_loss_and_gradient(graphdef, jit)(
        everything, nnx.State({}), jax.random.key(0), golden.observation(inputs),
        *(jnp.asarray(inputs[name]) for name in ("actions", "noise", "time")),
    )  # fmt: skip
    ours, theirs = by_path(gradient), golden.arrays(f"{model}_grads")
    assert ours.keys() == theirs.keys()
    norm = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in ours.values()))
    np.testing.assert_allclose(loss, outputs["grads_mean_loss"], atol=5e-4)
    np.testing.assert_allclose(norm, outputs["grads_global_norm"], rtol=1e-4)
    for path, expected in theirs.items():
        # A bias on all keys shifts every score alike: its gradient is zero but for rounding, here as in openpi.
        rounding = 1e-6 * norm
        assert np.linalg.norm(ours[path] - expected) <= 1e-4 * np.linalg.norm(expected) + rounding, path


TRAINING = {"pi0_ema": "pi0", "pi05_noema": "pi05", "pi0_lora": "pi0_lora"}


def kernel_norm(flat):
    """Norm of all arrays with several axes that are neither biases, scales nor embeddings.

    As openpi adds it up: the squares of a frozen array, and their sum, in its bfloat16.
    """
    other = ("bias", "scale", "pos_embedding", "input_embedding")
    kernels = [array for path, array in flat.items() if array.ndim > 1 and path.split("/")[-1] not in other]
    return np.sqrt(sum(float(jnp.sum(jnp.square(array))) for array in kernels))


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("run", TRAINING)
def test_three_training_steps_are_openpis(golden, jit, run):
    model = TRAINING[run]
    arrays = golden.arrays(f"{run}_train")
    config = golden.config(model)
    start = {  # frozen parameters are kept in bfloat16
        path: jnp.asarray(value, "bfloat16") if config.freezes(path) else value
        for path, value in golden.arrays(f"{model}_params").items()
    }
    graphdef, trainable, frozen = split_trainable(golden.model(model))
    frozen = jax.tree.map(lambda array: array.astype("bfloat16"), frozen)
    schedule = optax.warmup_cosine_decay_schedule(3e-3 / 3, 3e-3, warmup_steps=2, decay_steps=10, end_value=3e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-10)
    )
    decay = golden.meta[f"{run}_checkpoint"]["ema_decay"]
    average, opt_state = trainable, optimizer.init(trainable)
    loss_and_gradient = mean_loss_and_gradient(graphdef, jit)
    update = jit(optimizer.update)
    for step in range(3):
        rng = jax.random.fold_in(jax.random.key(42), step)
        loss, gradient = loss_and_gradient(
            trainable, frozen, rng, golden.observation(arrays), jnp.asarray(arrays["actions"]), None, None
        )
        updates, opt_state = update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        if decay is not None:
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trainable)
        expected = {name: arrays[f"step{step}/{name}"] for name in ("loss", "grad_norm", "param_norm")}
        np.testing.assert_allclose(loss, expected["loss"], atol=5e-4)
        np.testing.assert_allclose(optax.global_norm(gradient), expected["grad_norm"], rtol=1e-3)
        norm = kernel_norm(by_path(nnx.merge_state(trainable, frozen)))
        np.testing.assert_allclose(norm, expected["param_norm"], rtol=1e-5)
    compare_trained(by_path(nnx.merge_state(trainable, frozen)), golden.arrays(f"{run}_train_params"), start)
    if decay is not None:
        compare_trained(by_path(average), golden.arrays(f"{run}_train_ema_params"), start)


def compare_trained(ours, theirs, start):
    """Every array, and the distance from openpi's in all as a share of the way that three steps went."""
    assert ours.keys() == theirs.keys()
    way, off = 0.0, 0.0
    for path, expected in theirs.items():
        way += np.sum(np.square(expected - np.asarray(start[path], np.float32), dtype=np.float64))
        off += np.sum(np.square(expected - ours[path].astype(np.float32), dtype=np.float64))
        if path.endswith("key/bias"):  # its gradient is rounding alone, and Adam divides by the gradient's size
            continue
        np.testing.assert_allclose(ours[path].astype(np.float32), expected, atol=1e-3, err_msg=path)
    assert way > 0
    assert np.sqrt(off) < 0.02 * np.sqrt(way)


# -- parameter tables --------------------------------------------------------------------------------------------------

RELEASED = {
    "pi0": pi0.Pi0Config(),
    "pi05": pi0.Pi0Config(pi05=True),
    "pi0_lora": pi0.Pi0Config(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora"),
    "pi05_lora": pi0.Pi0Config(pi05=True, paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora"),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(assert_released, name):
    assert_released(name, RELEASED[name])


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pi05", "tokens"), [(False, 48), (True, 200)])
def test_config_defaults(pi05, tokens):
    config = pi0.Pi0Config(pi05=pi05)
    assert (config.max_token_len, config.discrete_state_input, config.image_size) == (tokens, pi05, 224)
    assert (config.state_dim, config.action_dim, config.action_horizon) == (32, 32, 50)


def test_config_takes_other_sizes():
    config = pi0.Pi0Config(pi05=True, max_token_len=7, discrete_state_input=False, image_size=28, state_dim=3)
    assert (config.max_token_len, config.discrete_state_input, config.state_dim) == (7, False, 3)
    assert config.vision.num_tokens == 4


def test_camera_must_not_be_named_twice():
    with pytest.raises(ValueError, match="names one twice"):
        pi0.Pi0Config(cameras=("front", "front"))


def test_suffix_and_backbone_share_all_parameters():
    paths = weights.flatten(nnx.eval_shape(lambda: RELEASED["pi05_lora"].create(nnx.Rngs(0))))
    suffix = {path for path in paths if pi0.is_suffix_param(path)}
    backbone = {path for path in paths if pi0.is_backbone_param(path)}
    assert suffix | backbone == paths.keys()
    assert not suffix & backbone
    assert {"PaliGemma/llm/final_norm_1/Dense_0/kernel", "time_mlp_in/bias"} <= suffix
    assert {"PaliGemma/llm/final_norm/scale", "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias"} <= (
        backbone
    )


# -- properties, on a model of ours ------------------------------------------------------------------------------------

TINY = pi0.Pi0Config(
    action_dim=3,
    action_horizon=4,
    max_token_len=5,
    dtype="float32",
    paligemma_variant=gemma.Config(width=8, depth=2, mlp_dim=12, num_heads=4, num_kv_heads=2, head_dim=14),
    action_expert_variant=gemma.Config(width=6, depth=2, mlp_dim=10, num_heads=4, num_kv_heads=2, head_dim=14),
    vision_variant=siglip.Config(image_size=4, patch_size=2, width=6, depth=2, mlp_dim=5, num_heads=2),
    vocab_size=11,
    cameras=("front", "wrist"),
    remat=False,
)
BATCH = 3


def draw_observation(seed, config=TINY):
    rng = np.random.default_rng(seed)
    observation = Observation(
        state=rng.normal(size=(BATCH, config.state_dim)).astype(np.float32),
        images={name: rng.integers(0, 256, (BATCH, 4, 4, 3), np.uint8) for name in config.cameras},
        image_masks={name: np.ones(BATCH, bool) for name in config.cameras},
        tokenized_prompt=rng.integers(0, config.vocab_size, (BATCH, config.max_token_len), np.int32),
        tokenized_prompt_mask=np.ones((BATCH, config.max_token_len), bool),
    )
    return jax.tree.map(jnp.asarray, observation)


def draw_actions(seed, n=2, config=TINY):
    rng = np.random.default_rng(seed)
    x_t = rng.normal(size=(n, BATCH, config.action_horizon, config.action_dim)).astype(np.float32)
    return jnp.asarray(x_t), jnp.asarray(rng.random((n, BATCH), np.float32))


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def policy(request, fill):
    config = dataclasses.replace(TINY, pi05=request.param)
    return fill(lambda: config.create(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def run(policy, jit):
    """Prefix features and velocity of an observation."""

    def features_and_velocity(observation, x_t, time):
        prefix = policy.encode(observation)
        return prefix.features, policy.velocity(prefix, x_t, time)

    return jit(features_and_velocity)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), camera=st.sampled_from(TINY.cameras), length=st.integers(0, TINY.max_token_len))
def test_what_is_masked_cannot_matter(run, seed, camera, length):
    """Sample 1 has one camera masked and a prompt of ``length`` tokens: their content may be anything."""
    observation, (x_t, time) = draw_observation(seed), draw_actions(seed)
    other = draw_observation(seed + 1000)
    masks = {**observation.image_masks, camera: jnp.array([True, False, True])}
    prompt_mask = observation.tokenized_prompt_mask.at[1, length:].set(False)
    observation = observation.replace(image_masks=masks, tokenized_prompt_mask=prompt_mask)
    changed_camera = observation.images[camera].at[1].set(other.images[camera][1])
    changed_prompt = jnp.where(prompt_mask, observation.tokenized_prompt, other.tokenized_prompt)
    changed = observation.replace(
        images={**observation.images, camera: changed_camera}, tokenized_prompt=changed_prompt
    )
    for before, after in zip(run(observation, x_t, time), run(changed, x_t, time), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-5)
    unmasked = changed.replace(image_masks={})
    assert not np.allclose(run(observation, x_t, time)[0][1], run(unmasked, x_t, time)[0][1], atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), sample=st.integers(0, BATCH - 1))
def test_samples_of_a_batch_are_independent(run, seed, sample):
    """Changing one sample changes that one and no other."""
    observation, (x_t, time) = draw_observation(seed), draw_actions(seed)
    changed = jax.tree.map(lambda a, b: a.at[sample].set(b[sample]), observation, draw_observation(seed + 1000))
    before, after = run(observation, x_t, time), run(changed, x_t, time)
    others = [i for i in range(BATCH) if i != sample]
    np.testing.assert_allclose(before[0][np.array(others)], after[0][np.array(others)], atol=1e-5)
    np.testing.assert_allclose(before[1][:, np.array(others)], after[1][:, np.array(others)], atol=1e-5)
    assert not np.allclose(before[1][:, sample], after[1][:, sample], atol=1e-5)


def test_candidates_are_independent(policy, jit):
    """Sampling three candidates at once is sampling each alone."""
    observation, (noise, _) = draw_observation(0), draw_actions(0, n=3)
    prefix = jit(policy.encode)(observation)
    together = jit(lambda noise: flow.sample(policy, prefix, noise, num_steps=3))(noise)
    alone = jit(lambda noise: flow.sample(policy, prefix, noise, num_steps=3))
    for candidate in range(3):
        np.testing.assert_allclose(together[candidate], alone(noise[candidate : candidate + 1])[0], atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_candidates_read_one_copy_of_the_cache(policy):
    """No intermediate array has candidates, prefix tokens and the head size all as axes: the cache is never tiled."""
    n, head_dim = 7, TINY.paligemma.head_dim
    prefix = nnx.eval_shape(lambda p, o: p.encode(o), policy, draw_observation(0))
    tokens = prefix.mask.shape[1]
    assert len({n, BATCH, tokens, head_dim, TINY.action_horizon, TINY.action_horizon + 1}) == 6
    x_t, time = draw_actions(0, n=n)
    jaxpr = jax.make_jaxpr(policy.velocity)(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), prefix), x_t, time
    ).jaxpr
    shapes = [set(shape) for shape in all_shapes(jaxpr)]
    assert any({tokens, head_dim} <= shape for shape in shapes)
    assert not any({n, tokens, head_dim} <= shape for shape in shapes)


def all_shapes(jaxpr):
    """Shapes of all values that a program and the programs inside it compute."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


def test_gradient_of_a_frozen_backbone_needs_no_backward_pass_through_it(policy, jit):
    """The suffix alone has a gradient when the prefix is held; and the loss reaches all of the suffix."""
    observation, (x_t, time) = draw_observation(0), draw_actions(0)
    graphdef, suffix, rest = nnx.split(policy, lambda path, _: pi0.is_suffix_param("/".join(map(str, path))), ...)
    prefix = jit(policy.encode)(observation)

    def loss(suffix, prefix):
        v_t = nnx.merge(graphdef, suffix, rest).velocity(prefix, x_t, time)
        return jnp.mean(jnp.square(v_t))

    gradient = jit(jax.grad(loss))(suffix, prefix)
    assert all(np.any(array) for array in by_path(gradient).values())


def test_model_without_cameras(fill, jit):
    """It has no image tower, and sees state and prompt; images in the observation are dropped."""
    config = dataclasses.replace(TINY, cameras=())
    blind = fill(lambda: config.create(nnx.Rngs(0)))
    assert not any("/img/" in path for path in weights.flatten(blind))
    with_images = draw_observation(0)
    sample = jit(blind.sample_actions, static_argnames="num_steps")
    expected = sample(jax.random.key(0), with_images.replace(images={}, image_masks={}), num_steps=2)
    np.testing.assert_array_equal(sample(jax.random.key(0), with_images, num_steps=2), expected)
    other_state = with_images.replace(state=with_images.state + 1)
    assert not np.allclose(sample(jax.random.key(0), other_state, num_steps=2), expected, atol=1e-3)
    with pytest.raises(ValueError, match="nothing to encode"):
        blind.encode(with_images.replace(tokenized_prompt=None, tokenized_prompt_mask=None))


def test_continuous_state_is_unseen_by_pi05(policy, run):
    observation, (x_t, time) = draw_observation(0), draw_actions(0)
    moved = observation.replace(state=observation.state + 1)
    same = np.array_equal(run(observation, x_t, time)[1], run(moved, x_t, time)[1])
    assert same == policy.config.pi05


def test_features_are_the_mean_of_valid_tokens():
    tokens = jnp.array([[[1.0], [5.0], [9.0]], [[1.0], [5.0], [9.0]]])
    mask = jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(pi0.pool(tokens, mask), [[5.0], [0.0]])
    assert pi0.pool(tokens.astype("bfloat16"), mask).dtype == jnp.float32


def test_positions_skip_invalid_tokens():
    valid = jnp.array([[False, True, True, False, True]])
    np.testing.assert_array_equal(pi0.token_positions(valid), [[-1, 0, 1, 1, 2]])


def test_attention_mask_by_hand():
    """State, then two actions: the state sees itself, the actions all three; an invalid one is cut out both ways."""
    starts = jnp.array([True, True, False])
    mask = pi0.attention_mask(jnp.array([[True, True, True], [True, False, True]]), starts)
    np.testing.assert_array_equal(mask[0], [[1, 0, 0], [1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(mask[1], [[1, 0, 0], [0, 0, 0], [1, 0, 1]])


def test_time_embedding_at_zero_and_its_periods():
    embedded = pi0.embed_time(jnp.array([0.0, 4.0]), 4)
    np.testing.assert_allclose(embedded[0], [0, 0, 1, 1])
    np.testing.assert_allclose(embedded[1], [0, 0, 1, 1], atol=2e-3)  # whole turns of both 0.004 and 4
    with pytest.raises(ValueError, match="must be even, got 5"):
        pi0.embed_time(jnp.zeros(1), 5)


def test_preprocessing_twice_is_preprocessing_once(policy):
    observation = draw_observation(0).replace(image_masks={})
    once = policy.PaliGemma.preprocess(observation)
    twice = policy.PaliGemma.preprocess(once)
    assert once.images.keys() == once.image_masks.keys() == set(TINY.cameras)
    assert once.image_masks["wrist"].all()
    for name, camera in once.images.items():
        assert camera.dtype == jnp.float32
        np.testing.assert_array_equal(camera, images.to_float(observation.images[name]))
        assert twice.images[name] is camera


def test_missing_camera_is_named(policy):
    observation = draw_observation(0)
    with pytest.raises(ValueError, match=r"lacks the cameras \['wrist'\]; it has \['front'\]"):
        policy.encode(observation.replace(images={"front": observation.images["front"]}))


def test_policy_is_a_flow_policy(policy):
    assert isinstance(policy, flow.FlowPolicy)
    assert (policy.action_dim, policy.action_horizon, policy.feature_dim) == (3, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("pi05", [False, True])
def test_fresh_model_of_named_sizes_trains(jit, pi05):
    """From scratch, gradient steps on the loss of a fixed draw lower it; all inputs are the nano size's."""
    config = pi0.Pi0Config(
        pi05=pi05,
        action_dim=3,
        action_horizon=4,
        max_token_len=5,
        paligemma_variant="nano",
        action_expert_variant="nano_expert",
        vision_variant="nano",
        vocab_size=11,
        cameras=("front",),
        unroll=pi05,
    )
    observation = draw_observation(0, config)
    actions = draw_actions(0, 1, config)[0][0]
    graphdef, state = nnx.split(config.create(nnx.Rngs(0)))
    loss_and_gradient = mean_loss_and_gradient(graphdef, jit)
    arguments = (nnx.State({}), jax.random.key(1), observation, actions, None, None)
    losses = []
    for _ in range(20):
        loss, gradient = loss_and_gradient(state, *arguments)
        losses.append(float(loss))
        length = 0.1 / optax.tree.norm(gradient)
        state = jax.tree.map(lambda value, slope: value - length * slope, state, gradient)  # noqa: B023
    # Not from the first step on: a fresh tower's tokens are zero, and the norm behind them blows up any change.
    assert losses[-1] < losses[0]
