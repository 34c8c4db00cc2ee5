"""Conversion between pi0's parameters and the names and layout of openpi's PyTorch port, in both directions.

In the port, layers are not stacked, a linear layer holds (out, in), and heads are folded into one axis. Every array is
a rearrangement of one of ours, so nothing is lost. One table, ``_TABLE``, maps the arrays; the axes of an array are
letters (n heads, h size of a head), and "nh" is one axis made of two.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from acrlpd.models import gemma, siglip

logger = logging.getLogger(__name__)

_PALIGEMMA = "paligemma_with_expert.paligemma.model"
_TOWER = f"{_PALIGEMMA}.vision_tower.vision_model"
_EXPERTS = {"": f"{_PALIGEMMA}.language_model", "_1": "paligemma_with_expert.gemma_expert.model"}
_TABLE_OF_WORDS = f"{_EXPERTS['']}.embed_tokens.weight"
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


class _Place(NamedTuple):
    """The place of one of our arrays, or of each of its layers, in the port."""

    path: str  # our path; if ``name`` contains {} for the layer, the layer is the array's first axis
    name: str  # the port's name
    ours: str  # our axes without the layer, such as "dnh"
    theirs: tuple[str, ...]  # the port's axes, such as ("nh", "d")
    part: int | None = None  # index into the axis after the layer; None: the whole axis

    @property
    def is_layered(self) -> bool:
        return "{}" in self.name

    @property
    def root(self) -> str:
        """The common beginning of the names of all layers of a stack; the whole name if there are no layers."""
        return self.name.partition(".layers.{}")[0]


def _tower() -> Iterator[_Place]:
    image, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    attention, layer = f"{block}/MultiHeadDotProductAttention_0", f"{_TOWER}.encoder.layers.{{}}"
    yield _Place(f"{image}/embedding/kernel", f"{_TOWER}.embeddings.patch_embedding.weight", "rcio", tuple("oirc"))
    yield _Place(f"{image}/embedding/bias", f"{_TOWER}.embeddings.patch_embedding.bias", "o", ("o",))
    yield _Place(f"{image}/pos_embedding", f"{_TOWER}.embeddings.position_embedding.weight", "1pd", ("1p", "d"))
    yield from _linear(f"{image}/head", f"{_PALIGEMMA}.multi_modal_projector.linear")
    for path, name in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        yield from _norm(f"{block}/{path}", f"{layer}.{name}")
    yield from _norm(f"{image}/Transformer/encoder_norm", f"{_TOWER}.post_layernorm")
    for path, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        yield from _linear(f"{block}/MlpBlock_0/{path}", f"{layer}.mlp.{name}")
    for path, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield _Place(f"{attention}/{path}/kernel", f"{layer}.self_attn.{name}.weight", "dnh", ("nh", "d"))
        yield _Place(f"{attention}/{path}/bias", f"{layer}.self_attn.{name}.bias", "nh", ("nh",))
    yield _Place(f"{attention}/out/kernel", f"{layer}.self_attn.out_proj.weight", "nhd", ("d", "nh"))
    yield _Place(f"{attention}/out/bias", f"{layer}.self_attn.out_proj.bias", "d", ("d",))


def _language(suffix: str) -> Iterator[_Place]:
    """Yield the places of one expert's arrays."""
    root, ours = _EXPERTS[suffix], "PaliGemma/llm/layers"
    layer = f"{root}.layers.{{}}"
    attention = f"{layer}.self_attn"
    yield _Place(f"{ours}/attn/q_einsum{suffix}/w", f"{attention}.q_proj.weight", "ndh", ("nh", "d"))
    yield _Place(f"{ours}/attn/kv_einsum{suffix}/w", f"{attention}.k_proj.weight", "ndh", ("nh", "d"), 0)
    yield _Place(f"{ours}/attn/kv_einsum{suffix}/w", f"{attention}.v_proj.weight", "ndh", ("nh", "d"), 1)
    yield _Place(f"{ours}/attn/attn_vec_einsum{suffix}/w", f"{attention}.o_proj.weight", "nhd", ("d", "nh"))
    yield _Place(f"{ours}/mlp{suffix}/gating_einsum", f"{layer}.mlp.gate_proj.weight", "dm", ("m", "d"), 0)
    yield _Place(f"{ours}/mlp{suffix}/gating_einsum", f"{layer}.mlp.up_proj.weight", "dm", ("m", "d"), 1)
    yield _Place(f"{ours}/mlp{suffix}/linear", f"{layer}.mlp.down_proj.weight", "md", ("d", "m"))
    norms = {
        f"{ours}/pre_attention_norm{suffix}": f"{layer}.input_layernorm",
        f"{ours}/pre_ffw_norm{suffix}": f"{layer}.post_attention_layernorm",
        f"PaliGemma/llm/final_norm{suffix}": f"{root}.norm",
    }
    for path, name in norms.items():
        yield _Place(f"{path}/scale", f"{name}.weight", "d", ("d",))
        yield from _linear(f"{path}/Dense_0", f"{name}.dense")  # pi0.5's adaptive norm


def _linear(path: str, name: str) -> Iterator[_Place]:
    yield _Place(f"{path}/kernel", f"{name}.weight", "io", ("o", "i"))
    yield _Place(f"{path}/bias", f"{name}.bias", "o", ("o",))


def _norm(path: str, name: str) -> Iterator[_Place]:
    yield _Place(f"{path}/scale", f"{name}.weight", "d", ("d",))
    yield _Place(f"{path}/bias", f"{name}.bias", "d", ("d",))


_PROJECTIONS = (
    "action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out", "time_mlp_in",
    "time_mlp_out",
)  # fmt: skip
_TABLE = (
    *_tower(),
    _Place("PaliGemma/llm/embedder/input_embedding", _TABLE_OF_WORDS, "vd", ("v", "d")),
    *_language(""),
    *_language("_1"),
    *(place for name in _PROJECTIONS for place in _linear(name, name)),
)
_BY_NAME = {place.name: place for place in _TABLE}
_BY_PATH: dict[str, list[_Place]] = {}
for _place in _TABLE:
    _BY_PATH.setdefault(_place.path, []).append(_place)


# -- to the port -------------------------------------------------------------------------------------------------------


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return all arrays of a pi0 or pi0.5 under openpi's PyTorch names, with unchanged dtypes.

    Raises:
        ValueError: the port has no place for a path, such as that of an adapter.
    """
    renamed: dict[str, np.ndarray] = {}
    for path, array in params.items():
        if "lora" in path:
            raise ValueError(f"{path}: openpi's PyTorch port has no adapters; merge them first (lora.merge)")
        if path not in _BY_PATH:
            raise ValueError(f"{path} has no name in openpi's PyTorch port")
        for place in _BY_PATH[path]:
            renamed.update(_split(place, np.asarray(array)))
    table = params["PaliGemma/llm/embedder/input_embedding"]
    width = renamed["action_in_proj.bias"].shape[0]
    # The port's action expert has an output head that is never used, but its loader requires it.
    renamed[UNUSED_HEAD] = np.zeros((table.shape[0], width), table.dtype)
    return renamed


def _split(place: _Place, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for layer, value in enumerate(array if place.is_layered else [array]):
        part = value if place.part is None else value[place.part]
        axes = dict(zip(place.ours, part.shape, strict=True))
        order = [place.ours.index(axis) for axis in "".join(place.theirs)]
        shape = [math.prod(axes[axis] for axis in group) for group in place.theirs]
        yield place.name.format(layer), part.transpose(order).reshape(shape)


# -- from the port -----------------------------------------------------------------------------------------------------


def is_torch(names: Mapping[str, Any]) -> bool:
    """Return whether arrays have the port's names, with or without the prefixes that LeRobot adds."""
    return any("paligemma_with_expert." in name and "/" not in name for name in names)


def head_sizes(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the head sizes, which the port's arrays do not show, as metadata for a file of ``to_torch``'s arrays."""
    found = {name: params[path].shape[-1] for name, path in _HEADS.items() if path in params}
    return {name: str(size) for name, size in found.items()}


def from_torch(
    arrays: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    stack: Callable[[Sequence[Any]], Any] = np.stack,
    where: str = "the weights",
) -> dict[str, Any]:
    """Return the port's arrays under our paths, stacked by layer, with unchanged dtypes.

    LeRobot's names are accepted too: with a prefix ``model.``, and those of older versions of its model. Older LeRobot
    policies also contain statistics. They are no parameters and are left out, with a warning that names them.

    Args:
        metadata: the file's metadata; may hold ``head_sizes``. Otherwise only sizes of named variants are known.
        stack: joins the layers of one array; tracing with ``jnp.stack`` gives the shapes without reading any number.

    Raises:
        ValueError: the port does not have a name, a layer is missing, or the number of heads does not follow from a
            size. The message names ``where``.
    """
    named = _usual_names(arrays, where)
    heads = _told_sizes(metadata or {}, where) or _known_sizes(named, where)
    found: dict[str, dict[tuple[int, int], Any]] = {}
    depths: dict[str, int] = {}  # number of layers by the root of the names
    for name, array in named.items():
        place, layer = _place_of(name, where)
        depths[place.root] = max(depths.get(place.root, 1), layer + 1)
        found.setdefault(place.path, {})[layer, place.part or 0] = _joined(place, array, heads, f"{where}: {name}")
    return {path: _assembled(path, parts, depths, stack, where) for path, parts in found.items()}


def _usual_names(arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arrays under the current names of openpi's port; of two tied arrays, only one."""
    statistics = [name for name in arrays if re.match(r"(model\.)*(un)?normalize_\w+\.", name)]
    if statistics:
        logger.warning(
            "%s: %d arrays are statistics, not parameters, and are left out (%s, ...). Give them as norm_stats.json.",
            where, len(statistics), statistics[0],
        )  # fmt: skip
    named = {_usual_name(name): array for name, array in arrays.items() if name not in set(statistics)}
    if len(named) < len(arrays) - len(statistics):
        raise ValueError(f"{where}: two arrays have the same name once LeRobot's prefix is taken off")
    named.pop(UNUSED_HEAD, None)  # it is never used
    if TIED_HEAD in named:  # the same matrix as the word table; saving a model drops one of the two
        named.setdefault(_TABLE_OF_WORDS, named[TIED_HEAD])
        del named[TIED_HEAD]
    return named


def _usual_name(name: str) -> str:
    name = re.sub(r"^(model\.)+", "", name)
    name = name.replace("paligemma.language_model.lm_head.", "paligemma.lm_head.")
    return re.sub(
        r"paligemma_with_expert\.paligemma\.(language_model\.model|vision_tower|multi_modal_projector)\.",
        lambda match: f"{_PALIGEMMA}.{match[1].removesuffix('.model')}.",
        name,
    )


def _place_of(name: str, where: str) -> tuple[_Place, int]:
    match = re.search(r"(?<=\.layers\.)\d{1,4}(?=\.)", name)
    template = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
    if template not in _BY_NAME:
        raise ValueError(
            f"{where}: {name} is no parameter of pi0 or pi0.5 under the names of openpi's PyTorch port. Adapters must "
            "be merged into their bases where they were trained."
        )
    return _BY_NAME[template], 0 if match is None else int(match[0])


_HEADS = {  # name in a file's metadata -> one of our arrays whose last axis has this size
    "acrlpd.head_dim": "PaliGemma/llm/layers/attn/q_einsum/w",
    "acrlpd.vision_head_dim": "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
}


def _told_sizes(metadata: Mapping[str, str], where: str) -> dict[str, int]:
    """Return the head sizes by the root of the names, if the file's metadata has them."""
    told = {name: metadata[name] for name in _HEADS if name in metadata}
    if not all(re.fullmatch(r"[1-9]\d{0,5}", size) for size in told.values()):
        raise ValueError(f"{where}: expected sizes of heads in its metadata, found {told}")
    if len(told) < len(_HEADS):
        return {}
    language, tower = (int(told[name]) for name in _HEADS)
    return {_TOWER: tower} | dict.fromkeys(_EXPERTS.values(), language)


def _known_sizes(named: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the head sizes by the root of the names, from the variants of stacks and towers known here."""
    sizes = {}
    for root in _EXPERTS.values():
        if keys := _shape(named, f"{root}.layers.0.self_attn.k_proj.weight"):
            sizes[root] = _language_head(keys[0], _shape(named, f"{root}.layers.0.self_attn.q_proj.weight"))
    if width := _shape(named, f"{_TOWER}.encoder.layers.0.self_attn.q_proj.weight"):
        sizes[_TOWER] = _tower_head(width[0], _shape(named, f"{_TOWER}.encoder.layers.0.mlp.fc1.weight"), where)
    return sizes


def _tower_head(width: int, hidden: tuple[int, ...], where: str) -> int:
    for config in siglip.VARIANTS.values():
        if (config.width, config.mlp_dim) == (width, *hidden[:1]):
            return config.width // config.num_heads
    known = ", ".join(f"{name} ({config.width}, {config.mlp_dim})" for name, config in siglip.VARIANTS.items())
    raise ValueError(
        f"{where}: the image tower has width {width} and MLP {hidden[0] if hidden else 'none'}, and PyTorch's names do "
        f"not tell the number of its heads. Sizes that are known: {known}"
    )


def _language_head(keys: int, queries: tuple[int, ...]) -> int:
    """Return the head size of the variant with both widths, else ``keys``: openpi's stacks have one key head."""
    for config in gemma.VARIANTS.values():
        if (config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim) == (keys, *queries[:1]):
            return config.head_dim
    return keys


def _shape(named: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(named[name].shape) if name in named else ()


def _joined(place: _Place, array: Any, heads: Mapping[str, int], where: str) -> Any:
    """Return one of the port's arrays with our axes."""
    if len(array.shape) != len(place.theirs):
        raise ValueError(f"{where} has shape {tuple(array.shape)}, expected {len(place.theirs)} axes")
    sizes = {"1": 1}
    if "h" in place.ours:
        sizes["h"] = next((size for root, size in heads.items() if place.name.startswith(root)), 0)
    for group, length in zip(place.theirs, array.shape, strict=True):
        known = math.prod(sizes.get(axis, 1) for axis in group)
        if not known or length % known:
            raise ValueError(f"{where} has shape {tuple(array.shape)}, expected heads of size {sizes.get('h') or '?'}")
        sizes |= {axis: length // known for axis in group if axis not in sizes}
    theirs = "".join(place.theirs)
    return array.reshape([sizes[axis] for axis in theirs]).transpose([theirs.index(axis) for axis in place.ours])


def _assembled(
    path: str,
    parts: Mapping[tuple[int, int], Any],
    depths: Mapping[str, int],
    stack: Callable[[Sequence[Any]], Any],
    where: str,
) -> Any:
    """Return one of our arrays, assembled from its layers and parts."""
    places = _BY_PATH[path]
    layers = depths[places[0].root]
    missing = [
        place.name.format(layer) for layer in range(layers) for place in places if (layer, place.part or 0) not in parts
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing; the weights are incomplete")
    shapes = {tuple(part.shape) for part in parts.values()}
    if len(shapes) > 1:
        raise ValueError(f"{where}: layers of {path} differ in shape: {sorted(shapes)}")
    if not places[0].is_layered:
        return parts[0, 0]
    one = [parts[layer, 0] if len(places) == 1 else stack([parts[layer, part] for part in (0, 1)])
           for layer in range(layers)]  # fmt: skip
    return stack(one)
