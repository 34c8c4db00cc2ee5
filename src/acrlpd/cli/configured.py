"""The arguments that commands about a run share: a preset or YAML file, then flags; the later value wins."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from acrlpd import fields, platforms, presets
from acrlpd.cli.idle import refuse_idle
from acrlpd.config import ConfigError, TrainConfig, from_dict, judged, to_dict, unjudged
from acrlpd.data.formats.options import DataSource
from acrlpd.overrides import apply_config_overrides, load_yaml, read_mapping

T = TypeVar("T", bound="Configured")
YAML_SUFFIXES = (".yaml", ".yml")


def take(flags: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value after ``--name`` (or ``--name=``), and the flags without it."""
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
    """Return the configuration that ``word`` names, changed by the flags of ``changed``, and the other flags."""
    return changed(named(word), flags)


def named(word: str) -> TrainConfig:
    """Return the configuration of a preset or a YAML file; its values are checked when all flags are known."""
    return load_yaml(word, presets.get_preset, judge=False) if is_yaml(word) else presets.get_preset(word)


def changed(
    config: TrainConfig, flags: Sequence[str], *, preset: TrainConfig | None = None
) -> tuple[TrainConfig, list[str]]:
    """Return ``config`` changed by ``--algorithm``, ``--environment`` and ``--config``, and the other flags.

    The values need not fit together before ``parse`` has read the other flags, too.

    ``preset``: what an environment shortens; None: ``config``. A stored configuration may be shortened already.
    """
    algorithm, rest = take(flags, "algorithm")
    environment, rest = take(rest, "environment")
    file, rest = take(rest, "config")
    if algorithm is not None:
        config = presets.with_algorithm(config, algorithm, judge=False)
    if environment is not None:
        changes = platforms.environment_overrides(preset or config, environment)
        config = apply_config_overrides(config, changes, judge=False)
    if file is not None:
        config = load_yaml(file, presets.get_preset, config, judge=False)
    return _with_parts(config, rest)


def _with_parts(config: TrainConfig, flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Return ``config`` with its optional parts (``env``, ``online_loss_weights``) as flags ask, and the other flags.

    A part is added with its defaults if a flag names a field of it (``--env.name``), and removed by ``--env None``.
    """
    rest = list(flags)
    parts: dict[str, Any] = {}
    for name in OPTIONAL_PARTS:
        word, rest = take(rest, name)
        if word not in (None, "None"):
            raise ValueError(
                f"--{name} {word}: expected None, or a field of it, such as --{name}.{OPTIONAL_PARTS[name]}"
            )
        spoken_of = any(flag.replace("-", "_").startswith(f"__{name}.") for flag in rest)
        if word is None and spoken_of and getattr(config, name) is None:
            parts[name] = {}
        elif word is not None:
            parts[name] = {} if spoken_of else None
    return from_dict(TrainConfig, parts, base=config, judge=False), rest


OPTIONAL_PARTS = {"env": "name", "online_loss_weights": "bc_weight"}  # each with one of its fields


def warn_of_the_unusual(config: TrainConfig) -> None:
    """Print the warnings of ``ConfigValidator`` for a platform's preset, without memory, which takes a plan."""
    if config.preset in platforms.PLATFORM_MAX_LR:
        for line in platforms.ConfigValidator.validate_config(config, config.preset, check_memory=False):
            print(f"warning: {line}", file=sys.stderr)


class _RefusedError(Exception):
    """An error whose message the parser must not rephrase."""


RULES = ConstructorRegistry()


@RULES.struct_rule
def _part(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Read a part of a configuration without its constructor: ``judged`` checks them all, with their full names."""
    if info.type not in PARTS or not isinstance(info.default, info.type):
        return None
    part: type = info.type
    members = [
        StructFieldSpec(name, hint, getattr(info.default, name), helptext=_help(part, name))
        for name, hint in fields.hints(part).items()
    ]
    return StructConstructorSpec(lambda **values: unjudged(part, values), tuple(members))


def _help(part: type, name: str) -> Callable[[], str]:
    """Return the comment beside a field and the values that it may have, for ``--help``."""
    return lambda: ". ".join(filter(None, (fields.comments(part).get(name), fields.limits(fields.hints(part)[name]))))


PARTS = frozenset(part for _, part in fields.parts(TrainConfig))


@RULES.primitive_rule
def _source(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[DataSource] | None:
    """Read a data set from one word: its fields as in a YAML file, ``{path: data/a, weight: 0.7}``."""
    if info.type is not DataSource:
        return None

    def read(words: list[str]) -> DataSource:
        try:
            return from_dict(DataSource, read_mapping(words[0]))
        except ConfigError as error:
            raise _RefusedError(f"--data.sources {words[0]}: {error}") from error

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{path: STR, weight: FLOAT, ...}",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, DataSource),
        str_from_instance=lambda source: [json.dumps(to_dict(source))],
    )


class Configured(Protocol):
    """Arguments of a command about a run."""

    @property
    def config(self) -> TrainConfig: ...


def parse(kind: type[T], default: T, flags: Sequence[str], prog: str, *, stored: TrainConfig | None = None) -> T:
    """Return ``default`` changed by the flags. All mistakes are reported at once, each flag's separately.

    ``stored``: what a run was started with; these values are not checked for being without effect.

    Raises:
        ConfigError: values that are not allowed or do not fit together; tyro prints other mistakes itself and exits.
    """

    def read(words: Sequence[str], *, tell: bool) -> T:
        form = (tyro.conf.AvoidSubcommands,)
        with contextlib.nullcontext() if tell else _silence():
            return tyro.cli(kind, args=words, default=default, prog=prog, config=form, registry=RULES)

    def right(found: T) -> T:
        config = judged(found.config, default.config)
        refuse_idle(config, stored)
        return dataclasses.replace(found, config=config)  # type: ignore[type-var]

    def readable(words: Sequence[str]) -> bool:
        try:
            read(words, tell=False)
        except (SystemExit, _RefusedError):
            return False
        return True

    try:
        return right(read(flags, tell=False))
    except SystemExit as stop:
        if not stop.code:  # help was asked for
            return read(flags, tell=True)
    except _RefusedError:
        pass
    guilty = [words for words in _apart(flags) if not readable(words)]
    problems: list[str] = []
    for words in guilty:
        with contextlib.suppress(SystemExit):
            try:
                read(words, tell=True)
            except _RefusedError as error:
                problems.append(str(error))
    try:
        right(read([word for words in _apart(flags) if words not in guilty for word in words], tell=True))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    sys.exit(2)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _apart(flags: Sequence[str]) -> list[list[str]]:
    """Return each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def is_yaml(word: str) -> bool:
    return Path(word).suffix in YAML_SUFFIXES
