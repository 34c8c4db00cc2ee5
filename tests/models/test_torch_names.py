"""openpi's PyTorch names: every array is there once, unchanged, and means the same in torch's conventions."""

import json
import re

import numpy as np
import pytest
from flax import nnx

from acrlpd.models import torch_names, weights
from acrlpd.models.pi0 import Pi0Config
from acrlpd.models.recognize import recognize

LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert.model"
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
NANO = Pi0Config(
    paligemma_variant="nano",
    action_expert_variant="nano_expert",
    vision_variant="nano",
    action_dim=8,
    action_horizon=5,
    vocab_size=32,
    image_size=64,
)


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def arrays(request, shared):
    """openpi's tiny model: ours by path, and renamed."""
    params = weights.read_params(shared / f"golden/{request.param}_params.npz")
    return params, torch_names.to_torch(params)


@pytest.mark.golden
def test_every_number_is_there_once(arrays):
    """The renaming only moves numbers: numbered one by one, each comes out once."""
    params, renamed = arrays
    counter, numbered = 0, {}
    for path, array in params.items():
        numbered[path] = np.arange(counter, counter + array.size).reshape(array.shape)
        counter += array.size
    moved = torch_names.to_torch(numbered)
    del moved[torch_names.UNUSED_HEAD]
    flat = np.concatenate([array.ravel() for array in moved.values()])
    np.testing.assert_array_equal(np.sort(flat), np.arange(counter))
    values = np.concatenate([params[path].ravel() for path in params])
    assert all(np.array_equal(values[moved[name]], renamed[name]) for name in moved)


@pytest.mark.golden
def test_layers_mean_the_same_in_torchs_conventions(arrays):
    """A linear layer is x W^T + b there, heads lie side by side in one axis, a picture is (channel, row, column)."""
    params, renamed = arrays
    rng = np.random.default_rng(0)

    def linear(name, x):
        bias = renamed.get(f"{name}.bias", 0)
        return x @ renamed[f"{name}.weight"].T + bias

    def same(ours, theirs):
        np.testing.assert_allclose(theirs, ours.reshape(theirs.shape), rtol=1e-4, atol=1e-5)

    llm = "PaliGemma/llm/layers"
    for suffix, root in (("", LANGUAGE), ("_1", EXPERT)):
        layer = f"{root}.layers.1"
        q = params[f"{llm}/attn/q_einsum{suffix}/w"][1]
        kv = params[f"{llm}/attn/kv_einsum{suffix}/w"][1]
        out = params[f"{llm}/attn/attn_vec_einsum{suffix}/w"][1]
        x = rng.normal(size=(3, q.shape[1])).astype(np.float32)
        heads = rng.normal(size=(3, *out.shape[:2])).astype(np.float32)
        same(np.einsum("td,ndh->tnh", x, q), linear(f"{layer}.self_attn.q_proj", x))
        same(np.einsum("td,kdh->tkh", x, kv[0]), linear(f"{layer}.self_attn.k_proj", x))
        same(np.einsum("td,kdh->tkh", x, kv[1]), linear(f"{layer}.self_attn.v_proj", x))
        same(np.einsum("tnh,nhd->td", heads, out), linear(f"{layer}.self_attn.o_proj", heads.reshape(3, -1)))
        gating, down = params[f"{llm}/mlp{suffix}/gating_einsum"][1], params[f"{llm}/mlp{suffix}/linear"][1]
        same(x @ gating[0], linear(f"{layer}.mlp.gate_proj", x))
        same(x @ gating[1], linear(f"{layer}.mlp.up_proj", x))
        hidden = rng.normal(size=(3, len(down))).astype(np.float32)
        same(hidden @ down, linear(f"{layer}.mlp.down_proj", hidden))

    block = "PaliGemma/img/Transformer/encoderblock"
    attention, layer = f"{block}/MultiHeadDotProductAttention_0", f"{TOWER}.encoder.layers.1"
    query = params[f"{attention}/query/kernel"][1]
    x = rng.normal(size=(3, len(query))).astype(np.float32)
    ours = np.einsum("td,dnh->tnh", x, query) + params[f"{attention}/query/bias"][1]
    same(ours, linear(f"{layer}.self_attn.q_proj", x))
    heads = rng.normal(size=(3, *query.shape[1:])).astype(np.float32)
    ours = np.einsum("tnh,nhd->td", heads, params[f"{attention}/out/kernel"][1]) + params[f"{attention}/out/bias"][1]
    same(ours, linear(f"{layer}.self_attn.out_proj", heads.reshape(3, -1)))
    patch = rng.normal(size=params["PaliGemma/img/embedding/kernel"].shape[:3]).astype(np.float32)
    kernel = renamed[f"{TOWER}.embeddings.patch_embedding.weight"]
    ours = np.einsum("hwc,hwcd->d", patch, params["PaliGemma/img/embedding/kernel"])
    same(ours, np.einsum("chw,dchw->d", patch.transpose(2, 0, 1), kernel))
    x = rng.normal(size=(3, len(params["action_in_proj/kernel"]))).astype(np.float32)
    same(x @ params["action_in_proj/kernel"] + params["action_in_proj/bias"], linear("action_in_proj", x))


@pytest.mark.golden
def test_names_of_the_released_size(shared):
    """A sample of the names and shapes that the port's loader asks for, for every array of pi0.5."""
    table = json.loads((shared / "spec/param-tables.json").read_text())["pi05"]["params"]
    shapes = {path: each["shape"] for path, each in table.items()}
    renamed = torch_names.to_torch({path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()})
    assert len([name for name in renamed if ".encoder.layers." in name]) == 27 * 16
    assert renamed[f"{EXPERT}.layers.17.self_attn.q_proj.weight"].shape == (2048, 1024)
    assert renamed[f"{LANGUAGE}.layers.0.self_attn.k_proj.weight"].shape == (256, 2048)
    assert renamed[f"{LANGUAGE}.embed_tokens.weight"].shape == (257152, 2048)
    assert renamed[f"{TOWER}.embeddings.patch_embedding.weight"].shape == (1152, 3, 14, 14)
    assert renamed[f"{TOWER}.embeddings.position_embedding.weight"].shape == (256, 1152)
    assert renamed[f"{EXPERT}.layers.0.input_layernorm.dense.weight"].shape == (3072, 1024)
    assert renamed[f"{EXPERT}.norm.dense.bias"].shape == (3072,)
    assert renamed[f"{LANGUAGE}.norm.weight"].shape == (2048,)
    assert renamed["time_mlp_in.weight"].shape == (1024, 1024)


def equal(ours, theirs):
    assert {path: (each.shape, each.dtype) for path, each in ours.items()} == {
        path: (each.shape, each.dtype) for path, each in theirs.items()
    }
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


@pytest.mark.golden
def test_there_and_back_no_number_changes(arrays):
    params, renamed = arrays
    equal(torch_names.from_torch(renamed, metadata=torch_names.head_sizes(params)), params)


def older(name):
    """As versions of the transformers library before 4.52 have it."""
    name = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
    return name.replace("paligemma.model.vision", "paligemma.vision").replace(
        "paligemma.model.multi", "paligemma.multi"
    )


SPELLINGS = {
    "LeRobot": lambda name: f"model.{name}",
    "wrapped twice": lambda name: f"model.model.{name}",
    "older LeRobot": lambda name: "model." + older(name),
}


@pytest.mark.golden
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_the_port_and_of_lerobot_are_read(arrays, tmp_path, spelling):
    """The word table lies there as the output head that is tied to it; statistics of LeRobot's are named."""
    params, renamed = arrays
    table = renamed.pop(f"{LANGUAGE}.embed_tokens.weight")
    named = {SPELLINGS[spelling](name): array for name, array in renamed.items()}
    named[SPELLINGS[spelling](torch_names.TIED_HEAD)] = renamed[f"{LANGUAGE}.embed_tokens.weight"] = table
    file = tmp_path / "model.safetensors"
    weights.write_safetensors(file, named, metadata={"format": "pt", **torch_names.head_sizes(params)})
    equal(weights.read_params(file), params)
    equal(weights.read_params(tmp_path), params)  # the folder, as openpi and LeRobot name it
    assert {path: (each.shape, each.dtype) for path, each in weights.inspect(tmp_path).items()} == {
        path: (each.shape, each.dtype) for path, each in params.items()
    }
    assert weights.locate(tmp_path) == file


def nano():
    """A nano pi0, whose sizes have a name, under the port's names and ours."""
    policy = nnx.eval_shape(lambda: NANO.create(nnx.Rngs(0)))
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in weights.flatten(policy).items()}
    return torch_names.to_torch(params), params


def test_sizes_that_have_a_name_need_no_metadata():
    renamed, params = nano()
    equal(torch_names.from_torch(renamed), params)
    assert recognize(params)["vision_variant"] == "nano"


def test_statistics_in_a_file_of_weights_are_left_out_by_name(caplog):
    renamed, params = nano()
    renamed["normalize_inputs.buffer_observation_state.mean"] = np.zeros(3)
    equal(torch_names.from_torch(renamed, where="a.safetensors"), params)
    assert "a.safetensors: 1 arrays are statistics" in caplog.text
    assert "normalize_inputs.buffer_observation_state.mean" in caplog.text


Q = f"{LANGUAGE}.layers.0.self_attn.q_proj.weight"
FC1 = f"{TOWER}.encoder.layers.1.mlp.fc1.weight"
MISTAKES = {
    "a layer is missing": (lambda w: w.pop(FC1), f"{TOWER}.encoder.layers.1.mlp.fc1.weight is missing"),
    "unknown": (lambda w: w.update({"paligemma_with_expert.extra.weight": w[FC1]}), "extra.weight is no parameter"),
    "adapter": (lambda w: w.update({f"{EXPERT}.layers.0.self_attn.q_proj.lora_A.weight": w[FC1]}), "Adapters must be"),
    "twice": (lambda w: w.update({f"model.{FC1}": w[FC1]}), "two arrays have the same name"),
    "layers differ": (lambda w: w.update({FC1: w[FC1][:, :8]}), "differ in shape"),
    "axes": (lambda w: w.update({FC1: w[FC1][0]}), "expected 2 axes"),
    "a long number": (lambda w: w.update({FC1.replace("layers.1", "layers." + "9" * 5000): w[FC1]}), "no parameter"),
    "unknown tower": (
        lambda w: w.update({name: array[:33] for name, array in w.items() if ".mlp.fc1." in name}),
        "do not tell the number of its heads",
    ),
    "heads": (
        lambda w: w.update({Q: w[Q][:9]}),
        "expected heads of size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_such_model_is_named(mistake):
    renamed, _ = nano()
    damage, message = MISTAKES[mistake]
    damage(renamed)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        torch_names.from_torch(renamed, where="model.safetensors")
    assert str(error.value).startswith("model.safetensors: ")


def test_adapters_are_refused():
    with pytest.raises(ValueError, match="no adapters"):
        torch_names.to_torch({"PaliGemma/llm/layers/attn/q_einsum/lora_a": np.zeros((2, 2))})
