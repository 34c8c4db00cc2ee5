"""``acrlpd weights inspect PATH`` and ``acrlpd weights convert SOURCE TARGET``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from acrlpd import presets
from acrlpd.files import printable
from acrlpd.models import gemma, lora, weights
from acrlpd.models.pi0 import Pi0Config
from acrlpd.models.pi0_fast import Pi0FastConfig
from acrlpd.models.recognize import recognize
from acrlpd.models.weights import Layout
from acrlpd.training import build

_2B, _300M = "gemma_2b_lora", "gemma_300m_lora"
VARIANTS: dict[str, Pi0Config | Pi0FastConfig] = {
    "pi0": Pi0Config(),
    "pi05": Pi0Config(pi05=True),
    "pi0_lora": Pi0Config(paligemma_variant=_2B, action_expert_variant=_300M),
    "pi05_lora": Pi0Config(pi05=True, paligemma_variant=_2B, action_expert_variant=_300M),
    "pi0_fast": Pi0FastConfig(),
    "pi0_fast_lora": Pi0FastConfig(paligemma_variant=_2B),
    "paligemma": Pi0Config(),  # the part of it that PaliGemma has
}
"""openpi's released models; a preset of this project is a variant as well."""

Source: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Target: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    """Show path, shape and dtype of every array, the totals, and the model they look like; no array is read."""

    path: Source  # a params folder, checkpoint, run, .npz, .safetensors, or a URL (gs://, hf://)
    variant: str | None = None  # list what differs from pi0, pi05, pi0_fast (or with _lora), paligemma, or a preset
    json: bool = False  # print one JSON object instead of a table


@dataclasses.dataclass(frozen=True)
class ConvertArguments:
    """Copy weights into another layout; from a training checkpoint, their moving average if it has one."""

    source: Source  # the weights to copy, named as for inspect
    target: Target  # NAME.npz, NAME.safetensors, or a folder for openpi's own layout
    layout: Layout | None = None  # None: by the target's name; orbax-bare has no level "value", like released weights
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"  # the dtype of all floating-point arrays
    variant: str | None = None  # refuse weights that are not exactly this model; as for inspect
    merge_adapters: bool = False  # add LoRA adapters to the weights they adapt, and write a model without them
    adapter_scaling: float | None = None  # alpha / rank of attention layers; None: that of the variant with these sizes
    overwrite: bool = False  # replace weights at the target


def main(argv: Sequence[str]) -> int:
    commands: dict[str, Callable[..., Any]] = {"inspect": InspectArguments, "convert": ConvertArguments}
    arguments = tyro.extras.subcommand_cli_from_dict(commands, prog="acrlpd weights", args=argv)
    return _inspect(arguments) if isinstance(arguments, InspectArguments) else _convert(arguments)


def _inspect(arguments: InspectArguments) -> int:
    arrays = weights.inspect(arguments.path)
    problems = _mismatches(arguments.variant, arrays)
    if arguments.json:
        print(json.dumps(_summary(arguments.path, arrays) | ({} if problems is None else {"mismatches": problems})))
    else:
        _print_table(arrays)
    _refuse(arguments.path, arguments.variant, problems)
    return 0


def _convert(arguments: ConvertArguments) -> int:
    layout = weights.check_target(arguments.target, arguments.layout, overwrite=arguments.overwrite)
    if arguments.variant is not None:
        problems = _mismatches(arguments.variant, weights.inspect(arguments.source))
        _refuse(arguments.source, arguments.variant, problems)
    arrays = weights.read_params(arguments.source)
    found = recognize(arrays)
    if not found:
        raise ValueError(
            f"{arguments.source} holds no known model: its arrays are named {', '.join(sorted(arrays)[:3])}. "
            "Expected a pi0, pi0.5, pi0-FAST or PaliGemma under openpi's names or those of its PyTorch port, or a "
            "policy that this project trained"
        )
    if arguments.adapter_scaling is not None and not arguments.merge_adapters:
        raise ValueError("--adapter_scaling has no effect without --merge_adapters: add that, or leave it out")
    if arguments.merge_adapters:
        arrays = _merged(arrays, found, arguments.adapter_scaling)
    if arguments.dtype != "keep":
        dtype = jnp.dtype(arguments.dtype)
        arrays = {
            path: array.astype(dtype, copy=False) if jnp.issubdtype(array.dtype, jnp.floating) else array
            for path, array in arrays.items()
        }
    weights.write(arguments.target, arrays, layout=layout, overwrite=arguments.overwrite)
    print(f"{arguments.target} ({layout}): {_totals(weights.inspect(arguments.target))}")
    return 0


def _merged(arrays: Mapping[str, Any], found: Mapping[str, str], scaling: float | None) -> dict[str, Any]:
    """Return the arrays with their adapters added; ``found`` describes their model."""
    if not any("lora" in path for path in arrays):
        raise ValueError("--merge_adapters: these weights have no adapters")
    variants = [found.get(f"{part}_variant", "none") for part in ("paligemma", "action_expert")]
    unknown = [name for name in variants if name not in gemma.VARIANTS and "attention_lora" in name]
    if unknown and scaling is None:
        raise ValueError(
            "the weights do not say how their adapters are scaled, and no variant is known with these sizes: "
            f"{unknown[0]}. Give --adapter_scaling, which is alpha / rank of the attention layers"
        )
    own = [gemma.VARIANTS[name].adapter_scaling if name in gemma.VARIANTS else 1.0 for name in variants]
    first, second = own if scaling is None else (scaling, scaling)
    return lora.merge(arrays, (first, second))


def _mismatches(variant: str | None, arrays: Mapping[str, Any]) -> list[str] | None:
    return None if variant is None else weights.mismatches(_expected(variant), arrays)


def _expected(variant: str) -> dict[str, Any]:
    """Return shape and dtype of every parameter of a variant; none is allocated."""
    if variant in VARIANTS:
        config = VARIANTS[variant]
    elif variant in presets.PRESETS:
        policy = presets.get_preset(variant).policy
        if policy.action_dim is None:
            raise ValueError(f"the sizes of preset {variant} come from its data: name a run of it, or another variant")
        config = build.pi0_config(policy, build.Dims(policy.action_dim, policy.action_dim), Pi0Config().cameras)
    else:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join([*VARIANTS, *presets.PRESETS])}")
    expected = weights.flatten(nnx.eval_shape(lambda: config.create(nnx.Rngs(0))))
    if variant != "paligemma":
        return dict(expected)
    return {path: leaf for path, leaf in expected.items() if not re.fullmatch(weights.NOT_IN_PALIGEMMA, path)}


def _refuse(path: str, variant: str | None, problems: list[str] | None) -> None:
    if problems:
        raise ValueError(f"{path} does not hold {variant}; {len(problems)} arrays differ:\n  " + "\n  ".join(problems))


def _summary(path: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": path,
        "looks_like": recognize(arrays),
        "num_arrays": len(arrays),
        "num_parameters": _num_parameters(arrays),
        "num_bytes": _num_bytes(arrays),
        "arrays": {
            name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name} for name, leaf in arrays.items()
        },
    }


def _print_table(arrays: Mapping[str, Any]) -> None:
    rows = [(name, str(tuple(leaf.shape)), np.dtype(leaf.dtype).name) for name, leaf in sorted(arrays.items())]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, shape, dtype in rows:
        print(printable(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype}"))
    print(f"\n{_totals(arrays)}")
    found = recognize(arrays)
    model = found.pop("model", "no model that is known here")
    print(f"looks like {model}" + "".join(f"\n  {field}: {value}" for field, value in found.items()))


def _totals(arrays: Mapping[str, Any]) -> str:
    dtypes = ", ".join(sorted({np.dtype(leaf.dtype).name for leaf in arrays.values()}))
    size = f"{_num_bytes(arrays) / 1e6:,.1f} MB"
    return f"{len(arrays)} arrays, {_num_parameters(arrays):,} parameters, {size}, {dtypes}"


def _num_parameters(arrays: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in arrays.values())


def _num_bytes(arrays: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize for leaf in arrays.values())
