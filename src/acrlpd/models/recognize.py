"""Recognize the model that a set of arrays belongs to, from paths and shapes alone."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from acrlpd.models import gemma, lora, siglip, spelled

_EMBEDDING, _ACTION_BIAS = "PaliGemma/llm/embedder/input_embedding", "action_out_proj/bias"
_POSITIONS = "PaliGemma/img/pos_embedding"
_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_TOWER = {  # number of axes, by path
    "PaliGemma/img/embedding/kernel": 4,
    f"{_BLOCK}/MultiHeadDotProductAttention_0/query/kernel": 4,
    f"{_BLOCK}/MlpBlock_0/Dense_0/kernel": 3,
}
_SMALL = {
    "mlp_flow": {"state_in/kernel", "chunk_time_in/kernel", "out/kernel"},
    "gaussian": {"mean/kernel", "log_std/kernel"},
}
_OF_ACTIONS = r"(action_in_proj|action_out_proj|state_proj|time_mlp_\w+|action_time_mlp_\w+)/.*|PaliGemma/llm/.*_1/.*"


def recognize(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return the model that has arrays of these paths and shapes, as fields of ``pi0.Pi0Config``; {} if unknown.

    ``model`` is pi0, pi05, paligemma (pi0-FAST has exactly the same arrays), or a small policy of this project,
    mlp_flow or gaussian, which are returned without sizes. Sizes that match no named variant are spelled out, as
    ``gemma.get_config`` and ``siglip.get_config`` read them; sizes that depend on ``unsized`` arrays are left out.
    """
    if not any(path.startswith("PaliGemma/") for path in arrays):
        return next(({"model": name} for name, paths in _SMALL.items() if paths <= arrays.keys()), {})
    if not any(re.fullmatch(_OF_ACTIONS, path) for path in arrays):
        found = {"model": "paligemma"}
    else:
        found = {"model": "pi05" if any(path.startswith("time_mlp_") for path in arrays) else "pi0"}
        if _has(arrays, _ACTION_BIAS, 1):
            found["action_dim"] = str(arrays[_ACTION_BIAS].shape[0])
    if _has(arrays, _EMBEDDING, 2):
        found["vocab_size"] = str(arrays[_EMBEDDING].shape[0])
    parts: dict[str, tuple[dict[str, int], Mapping[str, Any]]] = {
        "paligemma_variant": (_expert_sizes(arrays, 0), gemma.VARIANTS),
        "action_expert_variant": (_expert_sizes(arrays, 1), gemma.VARIANTS),
        "vision_variant": (_tower_sizes(arrays), siglip.VARIANTS),
    }
    found |= {part: _name_of(sizes, variants) for part, (sizes, variants) in parts.items() if sizes}
    return found | _image_size(arrays, found.get("vision_variant"))


def unsized(arrays: Mapping[str, Any], model: str) -> list[str]:
    """Return why sizes of ``model`` (``recognize``'s name) are unknown: one line per array missing or misshapen."""
    ranks = {_EMBEDDING: 2} | _stack(0) | _TOWER
    if model != "paligemma":
        ranks |= {_ACTION_BIAS: 1} | _stack(1)
    return [
        f"missing: {path}"
        if path not in arrays
        else f"shape: {path}, expected {rank} axes, found {tuple(arrays[path].shape)}"
        for path, rank in ranks.items()
        if not _has(arrays, path, rank)
    ]


def _has(arrays: Mapping[str, Any], path: str, rank: int) -> bool:
    return path in arrays and len(arrays[path].shape) == rank


def _stack(expert: int) -> dict[str, int]:
    """Return the arrays that determine a Gemma stack's sizes: number of axes by path."""
    ranks = {"attn/q_einsum": ("w", 4), "attn/kv_einsum": ("w", 5), "mlp": ("linear", 3)}
    return {
        f"PaliGemma/llm/layers/{gemma.expert_name(name, expert)}/{leaf}": rank for name, (leaf, rank) in ranks.items()
    }


def _expert_sizes(arrays: Mapping[str, Any], expert: int) -> dict[str, int]:
    """Return the sizes of a Gemma stack and the ranks of its LoRA adapters; {} if it is not there."""
    if not all(_has(arrays, path, rank) for path, rank in _stack(expert).items()):
        return {}
    q, kv, mlp = (arrays[path].shape for path in _stack(expert))
    sizes = {"depth": q[0], "width": q[2], "mlp_dim": mlp[1], "num_heads": q[1], "num_kv_heads": kv[2]}
    sizes["head_dim"] = q[3]

    def shape(part: str, leaf: str) -> tuple[int, ...]:
        path = f"PaliGemma/llm/layers/{gemma.expert_name(part, expert)}/{leaf}"
        return arrays[path].shape if path in arrays else ()

    ranks = {
        "attention_lora": shape("attn/q_einsum", "lora_a")[-1:],
        "mlp_lora": shape("mlp", "linear_lora_a")[-1:],
    }
    return sizes | {name: rank[0] for name, rank in ranks.items() if rank}


def _tower_sizes(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a SigLIP tower; {} if it is not there."""
    if not all(_has(arrays, path, rank) for path, rank in _TOWER.items()):
        return {}
    patch, query, mlp = (arrays[path].shape for path in _TOWER)
    depth, width, heads, _ = query
    return {
        "patch_size": patch[0],
        "depth": depth,
        "width": width,
        "mlp_dim": mlp[2],
        "num_heads": heads,
    }


def _image_size(arrays: Mapping[str, Any], variant: str | None) -> dict[str, str]:
    """Return the side of the tower's pictures, by its number of positions, unless it is that of the named variant."""
    if variant is None or not _has(arrays, _POSITIONS, 3):
        return {}
    tower = siglip.get_config(variant)
    side = math.isqrt(arrays[_POSITIONS].shape[1]) * tower.patch_size
    return {} if side == tower.image_size else {"image_size": str(side)}


def _name_of(sizes: Mapping[str, int], variants: Mapping[str, Any]) -> str:
    """Return the first named variant with exactly these sizes; without one, the sizes as text."""
    for name, config in variants.items():
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        ranks = {key: value.rank for key, value in fields.items() if isinstance(value, lora.Config)}
        numbers = {key: value for key, value in fields.items() if isinstance(value, int) and key != "image_size"}
        if numbers | ranks == sizes:
            return name
    return spelled.spell(sizes)
