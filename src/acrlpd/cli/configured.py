"""What commands about a run have in common: a preset or YAML file, then flags; later wins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acrlpd import platforms, presets
from acrlpd.config import TrainConfig, from_dict, to_dict
from acrlpd.overrides import apply_config_overrides, load_yaml

YAML_SUFFIXES = (".yaml", ".yml")


def take(flags: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value behind ``--name`` (or ``--name=``), and the flags without it."""
    rest, value = list(flags), None
    for place, flag in enumerate(flags):
        if flag.split("=")[0].replace("-", "_") != f"__{name}":
            continue
        if "=" in flag:
            return flag.partition("=")[2], rest[:place] + rest[place + 1 :]
        if place + 1 < len(flags):
            value = flags[place + 1]
            return value, rest[:place] + rest[place + 2 :]
        raise ValueError(f"--{name} needs a value")
    return value, rest


def starting_point(word: str, flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that ``word`` names, changed as those flags of ``changed`` ask; the other flags."""
    config = load_yaml(word, presets.get_preset) if is_yaml(word) else presets.get_preset(word)
    return changed(config, flags)


def changed(config: TrainConfig, flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """``config`` changed by ``--algorithm NAME``, ``--environment NAME`` and ``--config FILE``, and the other flags."""
    algorithm, rest = take(flags, "algorithm")
    environment, rest = take(rest, "environment")
    file, rest = take(rest, "config")
    if algorithm is not None:
        config = presets.with_algorithm(config, algorithm)
    if environment is not None:
        config = apply_config_overrides(config, platforms.environment_overrides(config, environment))
    if file is not None:
        config = load_yaml(file, presets.get_preset, config)
    return _with_parts(config, rest), rest


def _with_parts(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """``config`` with the defaults of a part that it lacks (``env``, ``online_loss_weights``) and a flag speaks of."""
    said = {flag.removeprefix("--").replace("-", "_").split(".")[0] for flag in flags if "." in flag.split("=")[0]}
    absent = [name for name, value in to_dict(config).items() if value is None and name in said]
    return from_dict(TrainConfig, {name: {} for name in absent}, base=config) if absent else config


def is_yaml(word: str) -> bool:
    return Path(word).suffix in YAML_SUFFIXES
