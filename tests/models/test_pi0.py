from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.config import CosineDecaySchedule, OptimizerConfig
from acrlpd.models import flow, gemma, images, pi0, siglip, stacked, weights
from acrlpd.training.optimizer import make_optimizer
from acrlpd.types import Observation

MODELS = ("pi0", "pi05", "pi0_lora")
PRECISIONS = {"f32": ("float32", "float32"), "bf16": ("bfloat16", "float32"), "bf16params": ("bfloat16", "bfloat16")}
SAMPLES = {"sample_1": 1, "sample_5": 5, "sample_10": 10}
TRAINING = {"pi0_ema": "pi0", "pi05_noema": "pi05", "pi0_lora": "pi0_lora"}


# -- openpi's numbers --------------------------------------------------------------------------------------------------


class Compiled:
    """A golden model and three programs around it, each compiled once for all tests that call it."""

    def __init__(self, policy, jit):
        self.policy = policy
        self.graphdef, self.state = nnx.split(policy)
        self._stages = jit(self._traced_stages)
        self._sample = jit(self._traced_sample)
        self.loss_and_gradient = jit(jax.value_and_grad(self._mean_loss, has_aux=True))

    def stages(self, observation, actions, noise, time):
        """All on the way to the loss, by the names of the golden files."""
        return jax.device_get(self._stages(self.state, observation, actions, noise, time))

    def sample(self, observation, noise, num_steps, *, state=None):
        state = self.state if state is None else state
        return jax.device_get(self._sample(state, observation, noise, jnp.int32(num_steps)))

    def _traced_stages(self, state, observation, actions, noise, time):
        policy = nnx.merge(self.graphdef, state)
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * actions
        prefix = policy.encode(observation)
        outputs = {
            "cache_k": prefix.cache[0],
            "cache_v": prefix.cache[1],
            "v_t_cached": policy.velocity(prefix, x_t[None], time[None])[0],
            "loss": flow.flow_loss(policy, prefix, actions, noise, time),
        }
        return outputs | joint_pass(policy, observation, x_t, time)

    def _traced_sample(self, state, observation, noise, num_steps):
        policy = nnx.merge(self.graphdef, state)
        return policy.sample_actions(jax.random.key(0), observation, noise=noise, num_steps=num_steps)

    def _mean_loss(self, trainable, frozen, observation, actions, noise, time):
        policy = nnx.merge(self.graphdef, trainable, frozen)
        loss = policy.compute_loss(jax.random.key(0), observation, actions, noise=noise, time=time)
        return loss.mean(), loss


def joint_pass(policy, observation, x_t, time):
    """Prefix and suffix as one sequence, as openpi trains."""
    tokens, mask, starts = policy.embed_prefix(observation)
    suffix_tokens, suffix_mask, suffix_starts, condition = policy.embed_suffix(observation.state, x_t, time)
    joint_mask = jnp.concatenate([mask, suffix_mask], axis=1)
    seen = pi0.attention_mask(joint_mask, jnp.concatenate([starts, suffix_starts]))
    positions = pi0.token_positions(joint_mask)
    (prefix_out, suffix_out), _ = policy.PaliGemma.llm([tokens, suffix_tokens], positions, seen, [None, condition])
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
    }
    return outputs if condition is None else outputs | {"adarms_cond": condition}


@pytest.fixture(scope="module")
def compiled(golden, jit):
    """A golden model in one precision; pi0.5 computes activations again in its backward pass."""

    @functools.cache
    def make(model, precision, apart):
        dtype, param_dtype = PRECISIONS[precision]
        options = {"dtype": dtype, "param_dtype": param_dtype, "remat": model == "pi05", "unroll": apart}
        policy = golden.model(model, **options)
        return Compiled(stacked.unrolled(policy) if apart else policy, jit)

    return lambda model, precision="f32", apart=False: make(model, precision, apart)


@pytest.fixture(scope="module")
def drawn(golden, jit):
    """What the policy hands to its loss for a key: the observation, noise and time."""
    policy = nnx.eval_shape(lambda: golden.config("pi0").create(nnx.Rngs(0)))  # draws need no parameters

    def read(rng, observation, actions, train):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pi0.Pi0, "encode", lambda self, observation: self.PaliGemma.preprocess(observation))
            patch.setattr(
                flow, "flow_loss", lambda policy, observation, actions, noise, time: (observation, noise, time)
            )
            return policy.compute_loss(rng, observation, actions, train=train)

    read = jit(read, static_argnames="train")

    def draw(rng, observation, actions, *, train=False):
        seen, noise, time = read(rng, observation.replace(**NO_PROMPT), actions, train)  # prompts differ in length
        return observation.replace(images=seen.images), noise, time

    return draw


NO_PROMPT = {"tokenized_prompt": None, "tokenized_prompt_mask": None}


def loss_inputs(golden, model):
    """Observation, actions, noise and time of the golden batch."""
    arrays = golden.arrays(f"{model}_inputs")
    return golden.observation(arrays), *(jnp.asarray(arrays[name]) for name in ("actions", "noise", "time"))


@pytest.fixture(scope="module")
def gradient(golden, compiled):
    """Mean loss, its gradient by path and the gradient's norm, for the golden batch."""

    @functools.cache
    def compute(model):
        program = compiled(model)
        (mean, _), found = program.loss_and_gradient(program.state, nnx.State({}), *loss_inputs(golden, model))
        found = by_path(found)
        return mean, found, np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in found.values()))

    return compute


@pytest.fixture(scope="module")
def computed(golden, compiled):
    """Our stages and samples of a golden model; ``apart`` with its layers as a server keeps them."""

    @functools.cache
    def compute(model, precision="f32", apart=False):
        program = compiled(model, precision, apart)
        inputs = loss_inputs(golden, model)
        return program.stages(*inputs) | {
            name: program.sample(inputs[0], inputs[2], steps) for name, steps in SAMPLES.items()
        }

    return compute


def of_a_key(golden, program, drawn, model):
    """Losses and samples whose noise and time are drawn from a key, as is the augmentation in training."""
    observation, actions, *_ = loss_inputs(golden, model)
    ours = {}
    for name, train in {"loss_key7": False, "loss_key7_train": True}.items():
        seen, noise, time = drawn(jax.random.key(7), observation, actions, train=train)
        ours[name] = program.stages(seen, actions, noise, time)["loss"]
    with pytest.MonkeyPatch.context() as patch:  # the noise that the policy draws, without compiling it all once more
        patch.setattr(pi0.Pi0, "encode", lambda self, observation: None)
        patch.setattr(flow, "sample", lambda policy, prefix, noise, num_steps: noise)
        start = program.policy.sample_actions(jax.random.key(3), observation)
    ours["sample_10_key3"] = program.sample(observation, start, 10)
    return ours | {"loss_key7_noise": noise, "loss_key7_time": time}


def of_odd_images(golden, program, jit, model):
    """A sample from cameras of other sizes than the model's."""
    observation, _, noise, _ = loss_inputs(golden, model)
    odd = observation.replace(images=jax.tree.map(jnp.asarray, golden.group(f"{model}_outputs", "odd_images/")))
    resized = jit(program.policy.PaliGemma.preprocess)(odd)  # as the policy does by itself:
    as_is = jax.eval_shape(lambda odd: program.policy.sample_actions(jax.random.key(0), odd), odd)
    assert as_is.shape == noise.shape
    return {"sample_5_odd_images": program.sample(resized, noise, 5)}


# How near float32 comes to each output, absolutely; the norm of the gradient relatively.
TOLERANCES = {
    **dict.fromkeys(("prefix_mask", "prefix_ar_mask", "suffix_mask", "suffix_ar_mask", "attn_mask", "positions"), 0.0),
    **dict.fromkeys(("loss_key7_noise", "loss_key7_time"), 1e-6),
    **dict.fromkeys(("prefix_tokens", "suffix_tokens", "adarms_cond"), 1e-5),
    **dict.fromkeys(("cache_k", "cache_v"), 5e-5),  # these went through a layer
    **dict.fromkeys(("prefix_out", "suffix_out", "v_t", "v_t_cached", "loss", *SAMPLES), 5e-4),
    **dict.fromkeys(("loss_key7", "loss_key7_train", "sample_10_key3", "sample_5_odd_images"), 5e-4),
    **dict.fromkeys(("grads_mean_loss", "grads_global_norm"), 5e-4),
}


def assert_openpis(ours, theirs):
    for name, value in ours.items():
        expected = theirs[name]
        if name == "prefix_out":  # what stands at masked tokens has no meaning
            value, expected = value[theirs["prefix_mask"]], expected[theirs["prefix_mask"]]
        rtol, atol = (1e-4, 0.0) if name == "grads_global_norm" else (0.0, TOLERANCES[name])
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=name)
    np.testing.assert_allclose(ours["v_t_cached"], ours["v_t"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_output_is_openpis(golden, compiled, computed, drawn, gradient, jit, model):
    """Every array of the file: the tower's stages are compared in test_siglip, those in bfloat16 below."""
    arrays = golden.arrays(f"{model}_outputs")
    assert {name.split("/")[0] for name in arrays} <= {*PRECISIONS, "odd_images"}
    theirs = {name: value for name, value in golden.group(f"{model}_outputs", "f32/").items() if "img/" not in name}
    mean, _, norm = gradient(model)
    ours = computed(model) | {"grads_mean_loss": mean, "grads_global_norm": norm}
    if model != "pi0_lora":
        program = compiled(model)
        ours |= of_a_key(golden, program, drawn, model) | of_odd_images(golden, program, jit, model)
    assert ours.keys() == theirs.keys()
    assert_openpis(ours, theirs)


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_layers_kept_apart_give_openpis_outputs(golden, computed, model):
    assert_openpis(computed(model, apart=True), golden.group(f"{model}_outputs", "f32/"))


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "bf16params"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_bfloat16_drifts_no_more_than_twice_openpis(golden, computed, model, precision, apart):
    """From float32, in the largest and the mean difference. Layers apart are a server's, which computes no loss.

    Where openpi's drift is not recorded, its array and ours must be as near to each other.
    """
    ours, theirs = computed(model, precision, apart), golden.group(f"{model}_outputs", f"{precision}/")
    exact, recorded = golden.group(f"{model}_outputs", "f32/"), golden.meta[model]["bf16_drift"]
    recorded = {name: recorded[f"{precision}/{name}"] for name in exact if f"{precision}/{name}" in recorded}
    assert recorded.keys() >= {"v_t", "loss", *SAMPLES}
    for name in recorded.keys() | theirs.keys():
        if apart and name == "loss":
            continue
        value, their = ours[name].astype("float32"), theirs.get(name)
        for key, measure in {"max_abs": np.max, "mean_abs": np.mean}.items():
            drift = measure(np.abs(value - exact[name]))
            their_drift = recorded[name][key] if name in recorded else measure(np.abs(their - exact[name]))
            at_least = TOLERANCES[name]  # what runs in float32 here, too, is as near as there
            assert drift <= max(2 * their_drift, at_least), (name, key)
            if name not in recorded:
                assert measure(np.abs(value - their)) <= max(2 * drift, at_least), (name, key)
            elif their is not None:
                assert measure(np.abs(their - exact[name])) == pytest.approx(their_drift, rel=1e-3), (name, key)


@pytest.mark.golden
def test_noise_of_a_key_is_openpis_bit_for_bit(golden):
    _, noise_rng, _ = jax.random.split(jax.random.key(7), 3)
    noise = golden.group("pi0_outputs", "f32/")["loss_key7_noise"]
    # Not with the tests' faster compilation, which rounds erf_inv otherwise.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    options["xla_cpu_use_fusion_emitters"] = True
    normal = jax.jit(lambda key: jax.random.normal(key, noise.shape), compiler_options=options)
    np.testing.assert_array_equal(normal(noise_rng), noise)


@pytest.mark.golden
@pytest.mark.parametrize("name", [*(f"{model}_inputs" for model in MODELS), *(f"{run}_train" for run in TRAINING)])
def test_times_and_noisy_chunks_are_openpis(golden, monkeypatch, name):
    """Between noise and actions, at a beta sample squeezed away from 0."""
    arrays = {key: jnp.asarray(value) for key, value in golden.arrays(name).items()}
    monkeypatch.setattr(jax.random, "beta", lambda rng, a, b, shape: arrays["beta_sample"])
    time = flow.sample_time(jax.random.key(0), arrays["time"].shape)
    np.testing.assert_allclose(time, arrays["time"], atol=1e-6)
    policy, noisy = nnx.eval_shape(lambda: golden.config("pi0").create(nnx.Rngs(0))), []
    monkeypatch.setattr(pi0.Pi0, "velocity", lambda self, prefix, x_t, time: noisy.append(x_t[0]) or x_t)
    prefix = flow.Prefix(state=arrays["state"], features=None, mask=None, cache=None)
    flow.flow_loss(policy, prefix, arrays["actions"], arrays["noise"], arrays["time"])
    np.testing.assert_allclose(noisy[0], arrays["x_t"], atol=1e-6)


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


COMPARED_IN = {  # groups of functions.npz
    "models/test_pi0.py": ("posemb", "mask"),
    "models/test_gemma.py": ("rope", "norm"),
    "models/test_lora.py": ("lora_einsum", "lora_ffn"),
    "models/test_images.py": ("resize", "augment"),
    "data/test_normalize.py": ("stats", "normalize", "unnormalize"),
    "data/test_transforms.py": ("resize", "delta"),
    "data/test_tokenizer.py": ("state_bins",),
    "data/test_robots.py": ("aloha",),
    "training/test_optimizer.py": ("schedule",),
}


@pytest.mark.golden
def test_every_group_of_functions_is_compared_somewhere(golden):
    groups = {name.split("/")[0] for name in golden.arrays("functions")}
    assert groups <= {name for names in COMPARED_IN.values() for name in names}
    for file, names in COMPARED_IN.items():
        source = (Path(__file__).parents[1] / file).read_text()
        assert all(f'"{name}/' in source for name in names), file


# -- gradients and training --------------------------------------------------------------------------------------------


def by_path(state):
    return {"/".join(map(str, path)): np.asarray(param.get_value()) for path, param in nnx.to_flat_state(state)}


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_openpis(golden, gradient, model):
    _, ours, norm = gradient(model)
    are_openpis(ours, golden.arrays(f"{model}_grads"), norm=norm)


def are_openpis(ours, theirs, *, norm):
    """Every array, in the norm of its difference."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        # A bias on all keys shifts every score alike: its gradient is zero but for rounding, here as in openpi.
        rounding = 1e-6 * norm
        assert np.linalg.norm(ours[path] - expected) <= 1e-4 * np.linalg.norm(expected) + rounding, path


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_gradients_through_layers_apart_are_openpis(golden, jit, gradient, model):
    """As the agent's update takes them, with respect to the stored arrays: cameras and adapters included."""
    options = {"dtype": "float32", "param_dtype": "float32", "remat": model == "pi05", "unroll": True}
    graphdef, state = nnx.split(golden.model(model, **options))

    def mean_loss(state, observation, actions, noise, time):
        policy = stacked.unrolled(nnx.merge(graphdef, state))
        return policy.compute_loss(jax.random.key(0), observation, actions, noise=noise, time=time).mean()

    ours = by_path(jit(jax.grad(mean_loss))(state, *loss_inputs(golden, model)))
    are_openpis(ours, golden.arrays(f"{model}_grads"), norm=gradient(model)[2])


def kernel_norms(state):
    """Return the two norms that openpi may log of all arrays with several axes that are neither biases, scales nor
    embeddings.

    openpi squares and sums an array in the array's own dtype, so the sum of a frozen array is rounded to bfloat16. Its
    squares are rounded as well where operations run one by one; a compiled program keeps them in float32 until they
    are summed (both seen with jax 0.5.3). Close to a rounding boundary this moves a sum by one part in 256, and the
    norm by a few parts in 10,000, so each of the two norms is compared within float32 rounding.
    """
    other = ("bias", "scale", "pos_embedding", "input_embedding")
    arrays = [param.get_value() for path, param in nnx.to_flat_state(state) if path[-1] not in other]
    arrays = [array for array in arrays if array.ndim > 1]
    one_by_one = [jnp.sum(jnp.square(array)) for array in arrays]
    compiled = [jnp.sum(jnp.square(array.astype("float32"))).astype(array.dtype) for array in arrays]
    return [np.sqrt(sum(float(each) for each in sums)) for sums in (one_by_one, compiled)]


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("run", TRAINING)
def test_three_training_steps_are_openpis(golden, compiled, drawn, jit, run):
    program, arrays = compiled(TRAINING[run]), golden.arrays(f"{run}_train")
    observation, actions = golden.observation(arrays), jnp.asarray(arrays["actions"])
    freezes = program.policy.config.freezes
    trainable, frozen = nnx.split_state(program.state, lambda path, _: not freezes("/".join(map(str, path))), ...)
    frozen = jax.tree.map(lambda array: array.astype("bfloat16"), frozen)  # as openpi keeps them
    start = by_path(nnx.merge_state(trainable, frozen))
    schedule = CosineDecaySchedule(warmup_steps=2, peak_lr=3e-3, decay_steps=10, decay_lr=3e-4)
    optimizer = make_optimizer(OptimizerConfig(schedule=schedule))
    decay = golden.meta[f"{run}_checkpoint"]["ema_decay"]

    @jit
    def apply(gradient, opt_state, trainable, average):
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        average = optax.incremental_update(trainable, average, 1 - (decay or 0))
        return opt_state, trainable, average, optax.tree.norm(gradient)

    average, opt_state = trainable, jit(optimizer.init)(trainable)
    for step in range(3):
        expected = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"step{step}/")}
        _, noise, time = drawn(jax.random.fold_in(jax.random.key(42), step), observation, actions)
        np.testing.assert_allclose(noise, expected["noise"], atol=1e-6)
        np.testing.assert_allclose(time, expected["time"], atol=1e-6)
        (loss, _), gradient = program.loss_and_gradient(trainable, frozen, observation, actions, noise, time)
        opt_state, trainable, average, gradient_norm = apply(gradient, opt_state, trainable, average)
        np.testing.assert_allclose(loss, expected["loss"], atol=5e-4)
        np.testing.assert_allclose(gradient_norm, expected["grad_norm"], rtol=1e-3)
        norms = kernel_norms(nnx.merge_state(trainable, frozen))
        assert any(np.isclose(norm, expected["param_norm"], rtol=1e-5, atol=0) for norm in norms), norms
    compare_trained(by_path(nnx.merge_state(trainable, frozen)), golden.arrays(f"{run}_train_params"), start)
    if decay is not None:
        compare_trained(by_path(average), golden.arrays(f"{run}_train_ema_params"), start)


@pytest.mark.golden
@pytest.mark.parametrize("run", TRAINING)
def test_restored_weights_sample_as_in_openpi(golden, compiled, run):
    """From the checkpoint of the three steps: its average, if there is one."""
    restored = golden.model(TRAINING[run], weights.read_params(golden.folder / f"{run}_checkpoint"))
    observation, expected = golden.observation(golden.arrays(f"{run}_train")), golden.arrays(f"{run}_restored_sample")
    program = compiled(TRAINING[run])
    ours = program.sample(observation, jnp.asarray(expected["noise"]), 10, state=nnx.state(restored))
    np.testing.assert_allclose(ours, expected["sample_10"], atol=5e-4)


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


def test_the_suffix_is_what_the_backbone_is_not():
    paths = weights.flatten(nnx.eval_shape(lambda: RELEASED["pi05_lora"].create(nnx.Rngs(0))))
    suffix = {path for path in paths if pi0.is_suffix_param(path)}
    backbone = paths.keys() - suffix
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


def test_a_camera_that_nobody_has_needs_no_tokens(policy, run, fill, jit):
    """Masked in every sample it is worth as much as not being in the config, which is cheaper."""
    config = dataclasses.replace(policy.config, cameras=("front",))
    smaller = fill(lambda: config.create(nnx.Rngs(0)))
    observation, (x_t, time) = draw_observation(0), draw_actions(0)
    masks = {"front": jnp.ones(BATCH, bool), "wrist": jnp.zeros(BATCH, bool)}

    def features_and_velocity(observation):
        prefix = smaller.encode(observation)
        return prefix.mask, prefix.features, smaller.velocity(prefix, x_t, time)

    mask, *ours = jit(features_and_velocity)(observation)
    assert mask.shape[1] == config.vision.num_tokens + config.max_token_len
    for value, expected in zip(ours, run(observation.replace(image_masks=masks), x_t, time), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


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
def test_fresh_model_of_named_sizes_trains(jit):
    """From scratch, gradient steps on the loss of a fixed draw lower it."""
    config = pi0.Pi0Config(
        pi05=True,
        action_dim=3,
        action_horizon=4,
        max_token_len=5,
        paligemma_variant="nano",
        action_expert_variant="nano_expert",
        vision_variant="nano",
        vocab_size=11,
        cameras=("front",),
        unroll=True,
    )
    rng = jax.random.key(0, impl="rbg")  # the usual kind of key takes long to compile
    policy = jit(lambda: config.create(nnx.Rngs(rng)))()
    observation, (actions, noise) = draw_observation(0, config), draw_actions(0, 2, config)[0]
    graphdef, state = nnx.split(policy)

    def loss(state):
        inputs = {"noise": noise, "time": jnp.full(BATCH, 0.5)}
        return nnx.merge(graphdef, state).compute_loss(rng, observation, actions, **inputs).mean()

    @jit
    def step(state):
        before, gradient = jax.value_and_grad(loss)(state)
        length = 0.1 / optax.tree.norm(gradient)
        return jax.tree.map(lambda value, slope: value - length * slope, state, gradient), before

    losses = []
    for _ in range(20):
        state, before = step(state)
        losses.append(float(before))
    # Not from the first step on: a fresh tower's tokens are zero, and the norm behind them blows up any change.
    assert losses[-1] < losses[0]
