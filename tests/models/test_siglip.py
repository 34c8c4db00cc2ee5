from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import siglip, weights

TINY = siglip.Config(image_size=4, patch_size=2, width=6, depth=2, mlp_dim=5, num_heads=2)


def tower(**changes):
    options = {"dtype": "float32", "param_dtype": "float32", "remat": False, "unroll": False, **changes}
    return siglip.SigLIP(TINY, out_width=8, rngs=nnx.Rngs(0), **options)


def golden_tower(golden, policy):
    params = golden.group(f"{policy}_params", "PaliGemma/img/")
    out_width = params["head/bias"].shape[0]
    model = nnx.eval_shape(
        lambda: siglip.SigLIP(
            golden.vision(),
            out_width=out_width,
            dtype="float32",
            param_dtype="float32",
            remat=True,
            unroll=False,
            rngs=nnx.Rngs(0),
        )
    )
    weights.load_into(model, params)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_every_stage_is_openpis(golden, policy):
    inputs, theirs = golden.arrays(f"{policy}_inputs"), golden.group(f"{policy}_outputs", "f32/img/")
    first_camera = next(key for key in inputs if key.startswith("image/"))
    image = jnp.asarray(inputs[first_camera])
    model = golden_tower(golden, policy)

    x = model.embed_patches(image)
    ours = {"stem": model.embedding(image), "with_posemb": x, "encoded": model.Transformer(x), "logits": model(image)}
    graphdef, state = nnx.split(model.Transformer.encoderblock)
    for number in range(golden.vision().depth):
        block = nnx.merge(graphdef, jax.tree.map(lambda stacked, number=number: stacked[number], state))
        stages = {"sa": block.MultiHeadDotProductAttention_0(block.LayerNorm_0(x))}
        stages["+sa"] = x + stages["sa"]
        stages["mlp"] = block.MlpBlock_0(block.LayerNorm_1(stages["+sa"]))
        stages["+mlp"] = x = stages["+sa"] + stages["mlp"]
        ours |= {f"encoder/block{number:02d}/{name}": value for name, value in stages.items()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-5, err_msg=name)


def test_patch_embedding_is_a_strided_convolution(fill):
    embedding = fill(lambda: siglip.PatchEmbedding(TINY, param_dtype="float32", rngs=nnx.Rngs(0)))
    image = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    convolved = jax.lax.conv_general_dilated(
        image, embedding.kernel[...], window_strides=(2, 2), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(embedding(image), convolved + embedding.bias[...][None, None, None], atol=1e-5)


def test_patches_run_row_by_row(fill):
    """A kernel of ones sums each patch: 2x2 patches of a 4x4 image whose pixels are their quadrant's number."""
    model = fill(tower)
    model.embedding.kernel.set_value(jnp.ones((2, 2, 3, 6)))
    model.embedding.bias.set_value(jnp.zeros(6))
    model.pos_embedding.set_value(jnp.zeros((1, 4, 6)))
    quadrants = jnp.kron(jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.ones((2, 2)))
    tokens = model.embed_patches(jnp.broadcast_to(quadrants[None, :, :, None], (1, 4, 4, 3)))
    np.testing.assert_allclose(tokens[0, :, 0], [0, 12, 24, 36])


def test_fresh_tower_gives_zero_tokens(jit):
    """openpi starts the head at zero; a test with fresh parameters cannot see an error before it."""
    assert not np.any(jit(lambda: tower()(jnp.ones((1, 4, 4, 3))))())


def test_patch_embedding_stays_in_float32():
    model = nnx.eval_shape(lambda: tower(dtype="bfloat16", param_dtype="bfloat16"))
    image = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    assert nnx.eval_shape(lambda model, x: model.embedding(x), model, image).dtype == jnp.float32
    assert nnx.eval_shape(lambda model, x: model(x), model, image).dtype == jnp.bfloat16


def test_loop_and_unrolled_layers_agree(fill, jit):
    image = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    looped, unrolled = (jit(fill(lambda unroll=unroll: tower(unroll=unroll)))(image) for unroll in (False, True))
    assert np.any(looped)
    np.testing.assert_allclose(looped, unrolled, atol=1e-6)


def test_named_sizes():
    released = siglip.get_config("so400m_14")
    assert (released.width, released.depth, released.mlp_dim, released.num_heads) == (1152, 27, 4304, 16)
    assert released.num_tokens == 256
    assert siglip.get_config("nano").num_tokens == 16
    assert siglip.get_config(TINY) is TINY


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"unknown image tower 'so400m'; known: so400m_14"):
        siglip.get_config("so400m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_size": 225}, "do not tile an image of 225"), ({"num_heads": 7}, "no multiple of num_heads, 7")],
)
def test_sizes_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        siglip.Config(**changes)
