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

SECTIONS = ("training", "model", "optimization")  # of a YAML file: they group fields and name none
BASE_KEYS = ("base_config", "platform")  # of a YAML file: which preset it changes

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
    "pi0_config.action_dim": ("data.action_dim",),  # the robot's; the model's own width stays
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
"""The founding design's names, whole or as the beginning of a path, and the fields they stand for."""


def apply_config_overrides(config: TrainConfig, overrides: Mapping[str, Any], *, judge: bool = True) -> TrainConfig:
    """The configuration with values by dotted name or nested, ours or the founding design's.

    Without ``judge`` they need not be right together yet, see ``from_dict``.

    Raises:
        ConfigError: every unknown name and every refused value, all at once.
    """
    nested: dict[str, Any] = {}
    problems = [problem for path, value in _flat(overrides) for problem in _put(nested, fields_of(path), value)]
    if problems:
        raise ConfigError("\n".join(problems))
    return from_dict(TrainConfig, nested, base=config, judge=judge)


merge_configurations = apply_config_overrides  # its name in the founding design, for one set of changes


def fields_of(path: str) -> tuple[str, ...]:
    """The configuration's own dotted names for ``path``; an unknown one is returned for the error message."""
    for section in SECTIONS:
        path = path.removeprefix(f"{section}.")
    for end in range(path.count("."), -1, -1):  # the longest beginning that has a name of its own
        head = ".".join(path.split(".")[: end + 1])
        if head in ALIASES:
            return tuple(target + path[len(head) :] for target in ALIASES[head])
    return (path,)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's content: a mapping, or an error that names the file."""
    try:
        return files.read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_mapping(text: str) -> dict[str, Any]:
    """Names with values, as they stand in a YAML file."""
    try:
        return files.parse_yaml(text, repr(text))
    except ValueError as error:
        raise ConfigError(f"{error}. Write it as in {{path: data/a, weight: 0.7}}") from error


def load_yaml(
    path: str | Path, preset: Callable[[str], TrainConfig], base: TrainConfig | None = None, *, judge: bool = True
) -> TrainConfig:
    """The preset that the file names (``base_config`` or ``platform``) with its changes, or ``base`` with them.

    Without ``judge`` the values need not be right together yet: flags may come over them.
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
    """The whole configuration; ``load_yaml`` of it gives the same one, whatever becomes of the preset."""
    values = to_dict(config)
    return yaml.safe_dump({"base_config": values.pop("preset"), **values}, sort_keys=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """One line for each field of two nested mappings that differs."""
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
