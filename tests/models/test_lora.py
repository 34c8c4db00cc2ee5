from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import lora, weights


def einsum(equation, adapter, **arrays):
    shape, init = arrays["w"].shape, nnx.initializers.zeros
    layer = nnx.eval_shape(lambda: lora.Einsum(equation, shape, init, adapter, param_dtype="float32", rngs=nnx.Rngs(0)))
    weights.load_into(layer, arrays)
    return layer


def feed_forward(adapter, **arrays):
    mlp_dim, width = arrays["linear"].shape
    layer = nnx.eval_shape(lambda: lora.FeedForward(width, mlp_dim, adapter, param_dtype="float32", rngs=nnx.Rngs(0)))
    weights.load_into(layer, arrays)
    return layer


@pytest.mark.parametrize(
    ("equation", "down", "up"),
    [
        ("BTD,NDH->BTNH", "BTD,NDr->BTNr", "BTNr,NrH->BTNH"),
        ("BSD,CKDH->CBSKH", "BSD,CKDr->CBSKr", "CBSKr,CKrH->CBSKH"),
        ("BTNH,NHD->BTD", "BTNH,NHr->BTr", "BTr,NrD->BTD"),
    ],
)
def test_adapter_equations(equation, down, up):
    assert lora.adapter_equations(equation) == (down, up)


def test_attention_output_adapter_sums_over_heads_twice():
    """Two heads, one number each: (x1 a1 + x2 a2)(b1 + b2), where head by head it would be x1 a1 b1 + x2 a2 b2."""
    layer = einsum(
        "BTNH,NHD->BTD",
        lora.Config(rank=1, alpha=1.0),
        w=np.zeros((2, 1, 1)),
        lora_a=np.array([2.0, 3.0]).reshape(2, 1, 1),
        lora_b=np.array([5.0, 7.0]).reshape(2, 1, 1),
    )
    x = jnp.array([1.0, 10.0]).reshape(1, 1, 2, 1)
    assert layer(x).item() == (1 * 2 + 10 * 3) * (5 + 7)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (lora.Config(rank=4, alpha=8.0), 2.0),
        (lora.Config(rank=4, alpha=8.0, rank_stabilized=True), 4.0),
        (lora.Config(rank=16, alpha=16.0), 1.0),
    ],
)
def test_scaling(config, scaling):
    assert config.scaling == scaling


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        lora.Config(rank=0)


@pytest.mark.golden
def test_einsum_is_openpis(golden):
    cases = golden.meta["lora_einsum"]
    assert cases
    for number, case in cases.items():
        arrays = golden.group("functions", f"lora_einsum/{number}/")
        x, expected = arrays.pop("x"), arrays.pop("out")
        result = einsum(case["eqn"], golden.lora(case), **arrays)(jnp.asarray(x))
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.golden
def test_feed_forward_is_openpis(golden):
    cases = golden.meta["lora_ffn"]
    assert any(case is None for case in cases.values())
    for number, case in cases.items():
        arrays = golden.group("functions", f"lora_ffn/{number}/")
        x, expected = arrays.pop("x"), arrays.pop("out")
        result = feed_forward(golden.lora(case), **arrays)(jnp.asarray(x))
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_feed_forward_adapter_is_not_scaled():
    """Rank 1, all ones: alpha 1 and alpha 100 give the same."""
    ones = {
        "gating_einsum": np.ones((2, 1, 1)),
        "gating_einsum_lora_a": np.ones((2, 1, 1)),
        "gating_einsum_lora_b": np.ones((2, 1, 1)),
        "linear": np.ones((1, 1)),
        "linear_lora_a": np.ones((1, 1)),
        "linear_lora_b": np.ones((1, 1)),
    }
    results = [feed_forward(lora.Config(rank=1, alpha=alpha), **ones)(jnp.ones((1, 1))) for alpha in (1.0, 100.0)]
    np.testing.assert_array_equal(*results)
    # x W0 + x A0 B0 = 2, the same for W1; (gelu(2) * 2) times (1 + 1 * 1)
    np.testing.assert_allclose(results[0], 2 * 2 * nnx.gelu(jnp.full((1, 1), 2.0), approximate=True), rtol=1e-6)


def test_adapter_is_computed_in_the_dtype_of_the_input():
    layer = einsum(
        "BTD,NDH->BTNH",
        lora.Config(rank=2, alpha=3.0),
        w=np.ones((2, 4, 3)),
        lora_a=np.ones((2, 4, 2)),
        lora_b=np.ones((2, 2, 3)),
    )
    result = layer(jnp.ones((1, 1, 4), jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, np.full((1, 1, 2, 3), 4 + 1.5 * 4 * 2))


@pytest.mark.parametrize(
    ("first_expert", "action_expert", "frozen"),
    [
        (False, False, set()),
        (True, False, {"PaliGemma/llm/layers/mlp/linear"}),
        (False, True, {"PaliGemma/llm/layers/mlp_1/linear"}),
        (True, True, {"PaliGemma/llm/layers/mlp/linear", "PaliGemma/llm/layers/mlp_1/linear"}),
    ],
)
def test_is_frozen(first_expert, action_expert, frozen):
    paths = [
        "PaliGemma/img/head/kernel",
        "PaliGemma/llm/layers/mlp/linear",
        "PaliGemma/llm/layers/mlp/linear_lora_a",
        "PaliGemma/llm/layers/mlp_1/linear",
        "PaliGemma/llm/layers/mlp_1/linear_lora_b",
        "action_in_proj/kernel",
    ]
    assert {path for path in paths if lora.is_frozen(path, first_expert=first_expert, action_expert=action_expert)} == (
        frozen
    )


@pytest.mark.parametrize(
    ("model", "first_expert", "action_expert", "count"),
    [
        ("pi0_lora", True, False, 9),
        ("pi0_lora", False, True, 8),
        ("pi0_lora", True, True, 17),
        ("pi05_lora", True, True, 20),
    ],
)
def test_number_of_frozen_arrays(param_tables, model, first_expert, action_expert, count):
    paths = [
        path
        for path in param_tables[model]["params"]
        if lora.is_frozen(path, first_expert=first_expert, action_expert=action_expert)
    ]
    assert len(paths) == count


@pytest.mark.parametrize("model", ["pi0_lora", "pi05_lora"])
def test_frozen_arrays_are_openpis(param_tables, model):
    for path, row in param_tables[model]["params"].items():
        assert lora.is_frozen(path, first_expert=True, action_expert=True) == row["frozen"], path


@pytest.mark.golden
def test_a_merged_model_is_the_adapted_one(golden, jit):
    """Velocities of openpi's tiny model with adapters, and of a model without any that has them added."""
    adapted = golden.config("pi0_lora")
    params = golden.arrays("pi0_lora_params")
    stacks = (adapted.paligemma, adapted.action_expert)
    merged = lora.merge(params, (stacks[0].adapter_scaling, stacks[1].adapter_scaling))
    assert not [path for path in merged if "lora" in path]
    arrays = {name: jnp.asarray(value) for name, value in golden.arrays("pi0_lora_inputs").items()}
    observation = golden.observation(arrays)
    plain = [dataclasses.replace(stack, attention_lora=None, mlp_lora=None) for stack in stacks]
    changes = {"paligemma_variant": plain[0], "action_expert_variant": plain[1]}

    def loss(policy):
        graphdef, state = nnx.split(policy)
        return jit(lambda state: nnx.merge(graphdef, state).compute_loss(
            jax.random.key(0), observation, arrays["actions"], noise=arrays["noise"], time=arrays["time"]
        ))(state)  # fmt: skip

    ours = loss(golden.model("pi0_lora", params=merged, **changes))
    np.testing.assert_allclose(ours, loss(golden.model("pi0_lora")), rtol=1e-4)
    bare = {path: array for path, array in params.items() if "lora" not in path}
    assert not np.allclose(ours, loss(golden.model("pi0_lora", params=bare, **changes)), rtol=1e-2)


@pytest.mark.parametrize("lost", ["attn/q_einsum/lora_a", "attn/q_einsum/lora_b", "attn/q_einsum/w"])
def test_half_an_adapter_is_not_merged(lost):
    params = {f"attn/q_einsum/{leaf}": np.ones((1, 2, 2)) for leaf in ("w", "lora_a", "lora_b")}
    del params[lost]
    with pytest.raises(ValueError, match="missing"):
        lora.merge(params, (1.0, 1.0))
