"""Which model a set of arrays belongs to, told by paths and shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from acrlpd.models import gemma, lora, siglip


def recognize(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The model that has arrays of these paths and shapes, in the fields of ``pi0.Pi0Config``; {} if none of ours.

    ``model`` is pi0, pi05 or paligemma (which pi0-FAST shares every array with). Sizes without a name are spelled out.
    """
    if "PaliGemma/llm/embedder/input_embedding" not in arrays:
        return {}
    if "action_out_proj/bias" not in arrays:
        found = {"model": "paligemma"}
    else:
        found = {"model": "pi05" if "time_mlp_in/kernel" in arrays else "pi0"}
        found["action_dim"] = str(arrays["action_out_proj/bias"].shape[0])
    found["vocab_size"] = str(arrays["PaliGemma/llm/embedder/input_embedding"].shape[0])
    parts: dict[str, tuple[dict[str, int], Mapping[str, Any]]] = {
        "paligemma_variant": (_expert_sizes(arrays, 0), gemma.VARIANTS),
        "action_expert_variant": (_expert_sizes(arrays, 1), gemma.VARIANTS),
        "vision_variant": (_tower_sizes(arrays), siglip.VARIANTS),
    }
    return found | {part: _name_of(sizes, variants) for part, (sizes, variants) in parts.items() if sizes}


def _expert_sizes(arrays: Mapping[str, Any], expert: int) -> dict[str, int]:
    """Sizes of a Gemma stack, and the ranks of its adapters; {} if it is not there."""

    def shape(part: str, name: str, leaf: str) -> tuple[int, ...]:
        path = f"PaliGemma/llm/layers/{part}{gemma.expert_name(name, expert)}{leaf}"
        return arrays[path].shape if path in arrays else ()

    q, kv, mlp = shape("attn/", "q_einsum", "/w"), shape("attn/", "kv_einsum", "/w"), shape("", "mlp", "/linear")
    if (len(q), len(kv), len(mlp)) != (4, 5, 3):
        return {}
    sizes = {"depth": q[0], "width": q[2], "mlp_dim": mlp[1], "num_heads": q[1], "num_kv_heads": kv[2]}
    sizes["head_dim"] = q[3]
    ranks = {
        "attention_lora": shape("attn/", "q_einsum", "/lora_a")[-1:],
        "mlp_lora": shape("", "mlp", "/linear_lora_a")[-1:],
    }
    return sizes | {name: rank[0] for name, rank in ranks.items() if rank}


def _tower_sizes(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a SigLIP tower; {} if it is not there."""
    block = "PaliGemma/img/Transformer/encoderblock"
    paths = {
        "patch": "PaliGemma/img/embedding/kernel",
        "query": f"{block}/MultiHeadDotProductAttention_0/query/kernel",
        "mlp": f"{block}/MlpBlock_0/Dense_0/kernel",
    }
    shapes = {name: arrays[path].shape for name, path in paths.items() if path in arrays}
    if {name: len(shape) for name, shape in shapes.items()} != {"patch": 4, "query": 4, "mlp": 3}:
        return {}
    depth, width, heads, _ = shapes["query"]
    return {
        "patch_size": shapes["patch"][0],
        "depth": depth,
        "width": width,
        "mlp_dim": shapes["mlp"][2],
        "num_heads": heads,
    }


def _name_of(sizes: Mapping[str, int], variants: Mapping[str, Any]) -> str:
    """The first of the named variants with exactly these sizes; without one, the sizes."""
    for name, config in variants.items():
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        ranks = {key: value.rank for key, value in fields.items() if isinstance(value, lora.Config)}
        numbers = {key: value for key, value in fields.items() if isinstance(value, int) and key != "image_size"}
        if numbers | ranks == sizes:
            return name
    return ", ".join(f"{key} {value}" for key, value in sizes.items())
