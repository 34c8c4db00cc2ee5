"""Changes to a configuration by name: dotted paths, YAML files, and the names that other descriptions of a run use.

>>> apply_config_overrides(get_preset("demo"), {"agent.discount": 0.95, "batch_size": 128})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from acrlpd import files
from acrlpd.config import ConfigError, TrainConfig, from_dict, to_dict

SECTIONS = ("training", "model", "optimization")  # keys of a YAML file that only group fields
BASE_KEYS = ("base_config", "platform")  # keys of a YAML file that name the preset it changes

_SCHEDULES = {
    "pi0_lr_schedule": ("optimizers.policy.schedule",),
    "critic_lr_schedule": ("optimizers.critic.schedule", "optimizers.temperature.schedule"),
    "pi0_optimizer": ("optimizers.policy",),
    "critic_optimizer": ("optimizers.critic",),
}
_GROUPS = {
    "pi0_config": ("policy",),
    "critic": ("agent.critic",),
    "critic_config": ("agent.critic",),
    "loss_weights": ("agent.loss_weights",),
    "temperature_config": ("agent.temperature",),
}
_AGENT = ("best_of_n_samples", "discount", "target_update_tau", "gradient_accumulation_steps")
_FIELDS = {
    **{name: (f"agent.{name}",) for name in _AGENT},
    **{f"{name}_weight": (f"agent.loss_weights.{name}_weight",) for name in ("bc", "critic", "actor", "alpha")},
    **{name: (f"data.{name}",) for name in ("batch_size", "sequence_ratio", "online_ratio")},
    "data_dir": ("data.path",),
    "diffusion_steps": ("agent.flow_steps",),
    "pi0_config.diffusion_steps": ("agent.flow_steps",),
    "pi0_config.action_dim": ("data.action_dim",),  # the robot's; the model's own width stays as it is
    "freeze_pi0_backbone": ("policy.freeze_pi0_backbone",),
    "eval_frequency": ("eval.frequency",),
    "num_eval_episodes": ("eval.episodes",),
    "experiment_name": ("name",),
    "project_name": ("loggers.project",),
    "checkpoint_dir": ("run_dir",),
    "pi0_peak_lr": ("optimizers.policy.schedule.peak_lr",),
    "critic_peak_lr": ("optimizers.critic.schedule.peak_lr", "optimizers.temperature.schedule.peak_lr"),
    "max_grad_norm": tuple(f"optimizers.{group}.clip_gradient_norm" for group in ("policy", "critic", "temperature")),
}
ALIASES: dict[str, tuple[str, ...]] = {**_SCHEDULES, **_GROUPS, **_FIELDS}
"""Names of the founding design, complete or as the beginning of a path, and the fields they stand for."""


def apply_config_overrides(config: TrainConfig, overrides: Mapping[str, Any], *, judge: bool = True) -> TrainConfig:
    """Return the configuration with new values, by dotted name or nested, under our or the founding design's names.

    Without ``judge`` the values need not fit together yet, see ``from_dict``.

    Raises:
        ConfigError: lists every unknown name and every refused value at once.
    """
    nested: dict[str, Any] = {}
    problems = [problem for path, value in _flat(overrides) for problem in _put(nested, fields_of(path), value)]
    if problems:
        raise ConfigError("\n".join(problems))
    return from_dict(TrainConfig, nested, base=config, judge=judge)


merge_configurations = apply_config_overrides  # the founding design's name, for one set of changes


def fields_of(path: str) -> tuple[str, ...]:
    """Return the configuration's own dotted names for ``path``; an unknown one as it is, for the error message."""
    for section in SECTIONS:
        path = path.removeprefix(f"{section}.")
    for end in range(path.count("."), -1, -1):  # the longest beginning that is an alias
        head = ".".join(path.split(".")[: end + 1])
        if head in ALIASES:
            return tuple(target + path[len(head) :] for target in ALIASES[head])
    return (path,)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the content of a YAML file, which must be a mapping; an error names the file."""
    try:
        return files.read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_mapping(text: str) -> dict[str, Any]:
    """Read names with values, written as in a YAML file."""
    try:
        return files.parse_yaml(text, repr(text))
    except ValueError as error:
        raise ConfigError(f"{error}. Write it as in {{path: data/a, weight: 0.7}}") from error


def load_yaml(
    path: str | Path, preset: Callable[[str], TrainConfig], base: TrainConfig | None = None, *, judge: bool = True
) -> TrainConfig:
    """Return the preset that the file names (``base_config`` or ``platform``), or ``base``, with the file's changes.

    Without ``judge`` the values need not fit together yet: flags may still replace them.
    """
    content = read_yaml(path)
    names = [content.pop(key) for key in BASE_KEYS if key in content]
    if base is None:
        base = preset(str(names[0])) if names else None
    if base is None:
        raise ConfigError(f"{path} names no preset to start from: add a line such as 'base_config: droid'")
    try:
        return apply_config_overrides(base, content, judge=judge)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def read_config(path: str | Path) -> TrainConfig:
    """Return the configuration in a run's ``config.json``."""
    values = files.read_json(path, allow_nan=True)
    try:
        return from_dict(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def to_yaml(config: TrainConfig) -> str:
    """Return the whole configuration; ``load_yaml`` reads the same one from it even if the preset changes."""
    values = to_dict(config)
    return yaml.safe_dump({"base_config": values.pop("preset"), **values}, sort_keys=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """Return one line for each field that differs between two nested mappings."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{path}{name}.")
        elif old != new:
            lines.append(f"{path}{name}: was {old!r}, now {new!r}")
    return lines


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _put(nested: dict[str, Any], paths: tuple[str, ...], value: Any) -> Iterator[str]:
    for path in paths:
        *heads, last = path.split(".")
        place = nested
        for head in heads:
            place = place.setdefault(head, {})
            if not isinstance(place, dict):
                yield f"{path}: {head} is given a value of its own as well"
                return
        place[last] = value
