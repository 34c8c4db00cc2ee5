from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import gemma, lora, stacked, weights

FIRST = gemma.Config(width=8, depth=3, mlp_dim=12, num_heads=4, num_kv_heads=2, head_dim=4)
SECOND = dataclasses.replace(FIRST, width=6, mlp_dim=10)


def stack(**changes):
    options = {"dtype": "float32", "param_dtype": "float32", "remat": False, "unroll": False, **changes}
    return gemma.Gemma([FIRST, SECOND], vocab_size=11, adaptive=[False, True], rngs=nnx.Rngs(0), **options)


def norm(adaptive, dtype, golden):
    arrays = golden.group("functions", "norm/")
    make = lambda: gemma.RMSNorm(  # noqa: E731
        arrays["x"].shape[-1], adaptive=adaptive, dtype=dtype, param_dtype="float32", rngs=nnx.Rngs(0)
    )
    names = {"Dense_0/kernel": "kernel", "Dense_0/bias": "bias"} if adaptive else {"scale": "scale"}
    layer = nnx.eval_shape(make)
    weights.load_into(layer, {path: arrays[name] for path, name in names.items()})
    x, condition = jnp.asarray(arrays["x"], dtype), jnp.asarray(arrays["cond"], dtype)
    return layer(x, condition if adaptive else None), arrays


@pytest.mark.golden
@pytest.mark.parametrize("suffix", ["", "256"])
def test_rotary_embedding_is_openpis(golden, suffix):
    arrays = golden.group("functions", "rope/")
    positions = arrays[f"positions{suffix}"]
    x = jnp.asarray(arrays[f"x{suffix}"])
    rotated = gemma.rotate(x, gemma.rotation(jnp.asarray(positions), x.shape[-1]))
    # float32 knows an angle of several hundred radians no better than to its spacing there.
    angle_error = np.spacing(np.float32(np.abs(positions).max()))
    np.testing.assert_allclose(rotated, arrays[f"out{suffix}"], atol=max(1e-5, 2 * angle_error))


@pytest.mark.golden
@pytest.mark.parametrize(("dtype", "label", "atol"), [("float32", "f32", 1e-5), ("bfloat16", "bf16", 2e-2)])
def test_norms_are_openpis(golden, dtype, label, atol):
    (plain, no_gate), arrays = norm(False, dtype, golden)
    assert no_gate is None
    np.testing.assert_allclose(plain.astype("float32"), arrays[f"plain_{label}"], atol=atol)
    (adaptive, gate), _ = norm(True, dtype, golden)
    assert adaptive.dtype == gate.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(adaptive.astype("float32"), arrays[f"ada_{label}"], atol=atol)
    np.testing.assert_allclose(gate.astype("float32"), arrays[f"ada_gate_{label}"], atol=atol)


@pytest.mark.golden
def test_gated_residual_is_openpis(golden):
    arrays = golden.group("functions", "norm/")
    x = jnp.asarray(arrays["x"])
    result = gemma.add_residual(x, 0.5 * x, jnp.asarray(arrays["gated_residual_gate"]))
    np.testing.assert_allclose(result, arrays["gated_residual_f32"], atol=1e-5)


def test_rotation_by_hand():
    """A head of 2: frequency 1, so position 1 turns (1, 0) by one radian, -1 turns it back, 0 leaves it."""
    x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 3, 1, 2))
    rotated = gemma.rotate(x, gemma.rotation(jnp.array([[-1, 0, 1]]), x.shape[-1]))
    expected = [[np.cos(1), -np.sin(1)], [1, 0], [np.cos(1), np.sin(1)]]
    np.testing.assert_allclose(rotated[0, :, 0], expected, atol=1e-6)


def test_plain_norm_by_hand():
    """(3, 4) has root mean square sqrt(12.5); a scale of 1 doubles."""
    layer = gemma.RMSNorm(2, adaptive=False, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    layer.scale.set_value(jnp.array([0.0, 1.0]))
    result, _ = layer(jnp.array([[[3.0, 4.0]]]), None)
    np.testing.assert_allclose(result[0, 0], np.array([3, 8]) / np.sqrt(12.5), rtol=1e-6)


def test_fresh_adaptive_norm_closes_its_branch():
    layer = gemma.RMSNorm(2, adaptive=True, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    x = jnp.array([[[3.0, 4.0]]])
    normed, gate = layer(x, jnp.ones((1, 2)))
    np.testing.assert_array_equal(gemma.add_residual(x, normed, gate), x)


def test_embedding_factor_is_rounded_with_the_table():
    """sqrt(2) is 1.4140625 in bfloat16, and the product is rounded too."""
    make = lambda: gemma.Embedder(3, 2, param_dtype="bfloat16", rngs=nnx.Rngs(0))  # noqa: E731
    embedder = nnx.eval_shape(make)
    weights.load_into(embedder, {"input_embedding": np.array([[1, 2], [3, 4], [5, 6]])})
    vectors = embedder(jnp.array([[2, 0]]))
    assert vectors.dtype == jnp.bfloat16
    np.testing.assert_array_equal(vectors, jnp.array([[[5, 6], [1, 2]]], jnp.bfloat16) * jnp.bfloat16(1.4140625))


def random_attention(rng, cached=3, new=2):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return draw(2, new, 4, 4), draw(2, cached + new, 2, 4), draw(2, cached + new, 2, 4)


def test_attention_over_a_cache_is_attention_over_everything():
    rng = np.random.default_rng(0)
    queries, keys, values = random_attention(rng)
    mask = jnp.asarray(rng.random((2, 2, 5)) < 0.6).at[:, :, -1].set(True)
    joined = gemma.attend(queries, keys, values, mask)
    split = gemma.attend(queries, keys[:, 3:], values[:, 3:], mask, cache=(keys[:, :3], values[:, :3]))
    np.testing.assert_allclose(joined, split, atol=1e-6)


def test_a_query_that_sees_nothing_averages_everything():
    queries, keys, values = random_attention(np.random.default_rng(0))
    mask = jnp.ones((2, 2, 5), bool).at[0, 1].set(False)
    attended = gemma.attend(queries, keys, values, mask)
    average = values[0].mean(axis=0)  # [k h]; two query heads share each
    np.testing.assert_allclose(attended[0, 1], np.repeat(average, 2, axis=0), atol=1e-6)
    assert not np.allclose(attended[0, 0], np.repeat(average, 2, axis=0), atol=1e-2)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1.0625 / 3), ("bfloat16", 0.35546875)])
def test_weights_are_rounded_as_openpis(dtype, expected):
    """One of three equal weights, on 1.0625: openpi rounds 1/3 to 0.333984375, then the product; 0.35352 would be off.

    In float32 the order does not matter.
    """
    nothing, values = jnp.zeros((1, 3, 1, 2), dtype), jnp.zeros((1, 3, 1, 2), dtype).at[0, 0].set(1.0625)
    cache, new = (nothing[:, :1], values[:, :1]), (nothing[:, 1:], values[:, 1:])
    attended = gemma.attend(nothing[:, :1], *new, jnp.ones((1, 1, 3), bool), cache)
    np.testing.assert_allclose(attended.astype("float32"), np.full((1, 1, 1, 2), expected), rtol=1e-6)


def test_query_heads_share_key_heads_in_order():
    """Values are their key head's number: heads 0 and 1 read key head 0, heads 2 and 3 read key head 1."""
    values = jnp.broadcast_to(jnp.array([0.0, 1.0])[None, None, :, None], (1, 3, 2, 4))
    attended = gemma.attend(jnp.ones((1, 1, 4, 4)), jnp.ones((1, 3, 2, 4)), values, jnp.ones((1, 1, 3), bool))
    np.testing.assert_allclose(attended[0, 0, :, 0], [0, 0, 1, 1])


FORMS = {
    "loop": {},
    "unrolled": {"unroll": True},
    "apart": {"unroll": True},
    "apart, rematerialised": {"unroll": True, "remat": True},
}


@pytest.fixture(scope="module")
def passes(fill, jit):
    """The same tokens in one joint pass, and the first expert's before the second's; with layers in every ``FORM``."""
    rng = np.random.default_rng(1)
    prefix, suffix, condition = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 5, 8), (2, 3, 6), (2, 6)]
    )
    valid = jnp.array([[True] * 8, [False, True, True, False, True, True, True, True]])
    visible = valid[:, None, :] & valid[:, :, None]
    mask = visible & ~(jnp.arange(8)[:, None] < 5)[None] | visible & (jnp.arange(8)[None, :] < 5)[None]
    positions = jnp.cumsum(valid, axis=1) - 1

    def run(model):
        joint, joint_cache = model([prefix, suffix], positions, mask, [None, condition])
        alone, full_cache = model([prefix, None], positions[:, :5], mask[:, :5, :5])
        cache = model.encode(prefix, positions[:, :5], mask[:, :5, :5])
        cached, new = model([None, suffix], positions[:, 5:], mask[:, 5:], [None, condition], cache)
        return {
            "joint": joint,
            "joint_cache": joint_cache,
            "alone": alone,
            "full_cache": full_cache,
            "cache": cache,
            "cached": cached,
            "new": new,
        }

    def model(form):
        filled = fill(lambda: stack(**FORMS[form]))
        return stacked.unrolled(filled) if form.startswith("apart") else filled

    return {form: jit(lambda form=form: run(model(form)))() for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_second_expert_sees_the_same_through_the_cache(passes, form):
    result = passes[form]
    assert result["cached"][0] is None
    np.testing.assert_allclose(result["cached"][1], result["joint"][1], atol=1e-4)
    for joint, cached, new in zip(result["joint_cache"], result["cache"], result["new"], strict=True):
        np.testing.assert_allclose(joint[:, 0], jnp.concatenate([cached, new], axis=2)[:, 0], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_encoding_skips_nothing_that_is_read(passes, form):
    result = passes[form]
    for full, cache in zip(result["full_cache"], result["cache"], strict=True):
        assert full.shape == (3, 2, 5, 2, 4)
        np.testing.assert_allclose(full, cache, atol=1e-5)
    np.testing.assert_allclose(result["alone"][0][0], result["joint"][0][0], atol=1e-4)


@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_all_forms_of_the_layers_agree(passes, form):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), passes["loop"], passes[form])


def test_adapters_keep_layers_from_fusing(fill, jit):
    """Of an attention with any, and of a feed-forward layer with its own; the numbers stay what they were."""
    adapter = lora.Config(rank=2)
    experts = [FIRST, dataclasses.replace(SECOND, attention_lora=adapter, mlp_lora=adapter)]
    options = {"dtype": "float32", "param_dtype": "float32", "remat": False, "unroll": True}
    model = fill(lambda: gemma.Gemma(experts, vocab_size=11, adaptive=[False, False], rngs=nnx.Rngs(0), **options))
    apart = stacked.unrolled(model)
    layer = apart.layers[0]
    assert (layer.attn.is_fused, layer.mlp.is_fused, layer.mlp_1.is_fused) == (False, True, False)

    rng = np.random.default_rng(2)
    tokens = [jnp.asarray(rng.normal(size=(1, 3, config.width)), jnp.float32) for config in experts]
    positions, mask = jnp.arange(6)[None], jnp.ones((1, 6, 6), bool)
    expected, found = (jit(lambda each=each: each(tokens, positions, mask))() for each in (model, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected, found)


def test_experts_must_agree():
    deeper = dataclasses.replace(SECOND, depth=4)
    with pytest.raises(ValueError, match=r"must agree in .* got \(3, 4, 2, 4\) and \(4, 4, 2, 4\)"):
        gemma.Gemma(
            [FIRST, deeper],
            vocab_size=2,
            adaptive=[False, False],
            dtype="float32",
            param_dtype="float32",
            remat=False,
            unroll=False,
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "must be a multiple"),
        ({"num_kv_heads": 4}, "openpi stores queries, keys and values in one array"),
        ({"head_dim": 3}, "head_dim must be even"),
    ],
)
def test_sizes_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FIRST, **changes)


def test_named_sizes():
    assert gemma.get_config("gemma_2b_lora").attention_lora == lora.Config(rank=16, alpha=16.0)
    assert gemma.get_config("gemma_300m_lora").mlp_lora == lora.Config(rank=32, alpha=32.0)
    assert not gemma.get_config("gemma_2b").has_lora
    for name in ("mid", "nano"):  # pairs of one stack
        nnx.eval_shape(
            lambda name=name: gemma.Gemma(
                [gemma.get_config(name), gemma.get_config(f"{name}_expert")],
                vocab_size=2,
                adaptive=[False, True],
                dtype="float32",
                param_dtype="float32",
                remat=False,
                unroll=False,
                rngs=nnx.Rngs(0),
            )
        )
    with pytest.raises(ValueError, match="unknown language model 'gemma'; known: gemma_2b"):
        gemma.get_config("gemma")
