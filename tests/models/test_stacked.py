"""Layers in one array, or as modules of their own."""

import jax
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import siglip, stacked, weights

CONFIG = siglip.Config(image_size=4, patch_size=2, width=6, depth=3, mlp_dim=5, num_heads=2)


@pytest.fixture(params=[False, True])
def tower(request, fill):
    def make():
        options = {"dtype": "float32", "param_dtype": "float32", "remat": False, "unroll": request.param}
        return siglip.SigLIP(CONFIG, out_width=8, rngs=nnx.Rngs(0), **options)

    return fill(make)


def test_apart_they_compute_the_same(tower, jit):
    image = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    apart = stacked.unrolled(tower)
    expected = jit(tower)(image)
    assert np.any(expected)
    for model in (apart, stacked.unrolled(apart)):  # the second time there is nothing to do
        np.testing.assert_allclose(jit(model)(image), expected, atol=1e-6)


def test_only_parts_that_unroll_come_apart(tower):
    before = weights.flatten(tower)
    apart = stacked.unrolled(tower)
    layers = apart.Transformer.encoderblock
    if not tower.Transformer.unroll:
        assert weights.flatten(apart).keys() == before.keys()
        return
    assert len(layers) == CONFIG.depth
    kernel = before["Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
    for number, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.MlpBlock_0.Dense_0.kernel[...], kernel[number])
    assert apart.head.kernel[...] is tower.head.kernel[...]
    assert weights.flatten(tower).keys() == before.keys()  # the original is as it was


def test_gradients_are_of_the_stacked_arrays(tower, jit):
    graphdef, state = nnx.split(tower)

    def loss(state, unroll):
        model = nnx.merge(graphdef, state)
        return (stacked.unrolled(model) if unroll else model)(image).var()

    image = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    whole, apart = (jit(lambda state, unroll=unroll: jax.grad(loss)(state, unroll))(state) for unroll in (False, True))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(whole["Transformer"]["encoderblock"]["MlpBlock_0"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, apart)
