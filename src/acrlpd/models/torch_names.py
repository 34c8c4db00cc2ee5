"""pi0's parameters under the names and in the layout of openpi's PyTorch port.

There, layers are not stacked, a linear layer holds (out, in), and heads are folded into one axis. Every array is a
rearrangement of one of ours, so nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

_PALIGEMMA = "paligemma_with_expert.paligemma.model"
_TOWER = f"{_PALIGEMMA}.vision_tower.vision_model"
_EXPERTS = {"": f"{_PALIGEMMA}.language_model", "_1": "paligemma_with_expert.gemma_expert.model"}
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"

_SINGLE = {
    "PaliGemma/img/embedding/kernel": f"{_TOWER}.embeddings.patch_embedding.weight",
    "PaliGemma/img/embedding/bias": f"{_TOWER}.embeddings.patch_embedding.bias",
    "PaliGemma/img/pos_embedding": f"{_TOWER}.embeddings.position_embedding.weight",
    "PaliGemma/img/Transformer/encoder_norm/scale": f"{_TOWER}.post_layernorm.weight",
    "PaliGemma/img/Transformer/encoder_norm/bias": f"{_TOWER}.post_layernorm.bias",
    "PaliGemma/img/head/kernel": f"{_PALIGEMMA}.multi_modal_projector.linear.weight",
    "PaliGemma/img/head/bias": f"{_PALIGEMMA}.multi_modal_projector.linear.bias",
    "PaliGemma/llm/embedder/input_embedding": f"{_PALIGEMMA}.language_model.embed_tokens.weight",
}
_TOWER_LAYER = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "MultiHeadDotProductAttention_0/query": "self_attn.q_proj",
    "MultiHeadDotProductAttention_0/key": "self_attn.k_proj",
    "MultiHeadDotProductAttention_0/value": "self_attn.v_proj",
    "MultiHeadDotProductAttention_0/out": "self_attn.out_proj",
}
_NORMS = {
    "layers/pre_attention_norm": "layers.{}.input_layernorm",
    "layers/pre_ffw_norm": "layers.{}.post_attention_layernorm",
    "final_norm": "norm",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays of a pi0 or pi0.5 under openpi's PyTorch names, in their own dtypes.

    Raises:
        ValueError: a path that the port has no place for, such as an adapter.
    """
    renamed: dict[str, np.ndarray] = {}
    for path, array in params.items():
        if "lora" in path:
            raise ValueError(f"{path}: openpi's PyTorch port has no adapters; it takes models trained in full")
        renamed.update(_arrays(path, np.asarray(array)))
    table = params["PaliGemma/llm/embedder/input_embedding"]
    width = renamed["action_in_proj.bias"].shape[0]
    # The port's action expert has an output head that nothing reads, but its loader asks for it.
    renamed[UNUSED_HEAD] = np.zeros((table.shape[0], width), table.dtype)
    return renamed


def _arrays(path: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if path in _SINGLE:
        yield _SINGLE[path], _single(path, array)
    elif match := re.fullmatch(r"PaliGemma/img/Transformer/encoderblock/(.+)/(\w+)", path):
        part, leaf = match.groups()
        for layer, value in enumerate(array):
            yield f"{_TOWER}.encoder.layers.{layer}.{_TOWER_LAYER[part]}.{_LEAVES[leaf]}", _tower(part, leaf, value)
    elif path.startswith("PaliGemma/llm/"):
        yield from _language(path.removeprefix("PaliGemma/llm/"), array)
    elif match := re.fullmatch(r"(\w+)/(kernel|bias)", path):
        yield f"{match[1]}.{_LEAVES[match[2]]}", array.T
    else:
        raise ValueError(f"{path} has no name in openpi's PyTorch port")


def _single(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith("img/embedding/kernel"):
        return array.transpose(3, 2, 0, 1)  # (h, w, in, out) to (out, in, h, w)
    if path.endswith("pos_embedding"):
        return array[0]
    return array.T if path.endswith("kernel") else array


def _tower(part: str, leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf != "kernel":
        return value.reshape(-1)
    if part.endswith("/out"):  # (heads, head, out)
        return value.reshape(-1, value.shape[-1]).T
    return value.reshape(value.shape[0], -1).T


def _language(path: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    suffix = "_1" if re.search(r"_1(/|$)", path) else ""
    path, root = re.sub(r"_1(?=/|$)", "", path), _EXPERTS[suffix]
    norm, _, leaf = path.partition("/scale") if path.endswith("/scale") else path.partition("/Dense_0/")
    if norm in _NORMS:
        inner = f"dense.{_LEAVES[leaf]}" if leaf else "weight"
        if norm == "final_norm":
            yield f"{root}.{_NORMS[norm]}.{inner}", array.T
            return
        for layer, value in enumerate(array):
            yield f"{root}.{_NORMS[norm].format(layer)}.{inner}", value.T
        return
    for layer, value in enumerate(array):
        for name, matrix in _language_layer(path, value):
            yield f"{root}.layers.{layer}.{name}.weight", matrix


def _language_layer(path: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    def heads_out(x: np.ndarray) -> np.ndarray:  # (heads, in, head) to (heads * head, in)
        return x.transpose(0, 2, 1).reshape(-1, x.shape[1])

    if path == "layers/attn/q_einsum/w":
        return [("self_attn.q_proj", heads_out(value))]
    if path == "layers/attn/kv_einsum/w":
        return [("self_attn.k_proj", heads_out(value[0])), ("self_attn.v_proj", heads_out(value[1]))]
    if path == "layers/attn/attn_vec_einsum/w":
        return [("self_attn.o_proj", value.reshape(-1, value.shape[-1]).T)]
    if path == "layers/mlp/gating_einsum":
        return [("mlp.gate_proj", value[0].T), ("mlp.up_proj", value[1].T)]
    if path == "layers/mlp/linear":
        return [("mlp.down_proj", value.T)]
    raise ValueError(f"{path} has no name in openpi's PyTorch port")
