"""What commands about a run have in common: a preset or YAML file, then flags; later wins."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from acrlpd import platforms, presets
from acrlpd.cli.idle import refuse_idle
from acrlpd.config import ConfigError, TrainConfig, from_dict, to_dict
from acrlpd.data.options import DataSource
from acrlpd.overrides import apply_config_overrides, load_yaml, read_mapping

T = TypeVar("T", bound="Configured")
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
    return changed(named(word), flags)


def named(word: str) -> TrainConfig:
    """The configuration of a preset or a YAML file; what the file says is judged when all flags are known."""
    return load_yaml(word, presets.get_preset, judge=False) if is_yaml(word) else presets.get_preset(word)


def changed(
    config: TrainConfig, flags: Sequence[str], *, preset: TrainConfig | None = None
) -> tuple[TrainConfig, list[str]]:
    """``config`` changed by ``--algorithm NAME``, ``--environment NAME`` and ``--config FILE``, and the other flags.

    The values need not be right together before ``parse`` has seen those flags, too.

    ``preset``: what an environment takes parts of; None: ``config`` itself, which a stored one, already cut, is not.
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
    """``config`` with the parts that it may lack (``env``, ``online_loss_weights``) as the flags want them.

    A part is there with its defaults if a flag speaks of it (``--env.name``), and absent after ``--env None``.
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
    """Prints what ``ConfigValidator`` says of a run with a platform's preset, but of memory, which takes a plan."""
    if config.preset in platforms.PLATFORM_MAX_LR:
        for line in platforms.ConfigValidator.validate_config(config, config.preset, check_memory=False):
            print(f"warning: {line}", file=sys.stderr)


class _RefusedError(Exception):
    """An error that the parser does not put into words of its own."""


SOURCES = ConstructorRegistry()


@SOURCES.primitive_rule
def _source(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[DataSource] | None:
    """A data set is one word: its fields as a YAML file has them, ``{path: data/a, weight: 0.7}``."""
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
    """``default`` as the flags have it; what is wrong is told at once, each flag's fault by itself.

    ``stored``: what a run was started with, which is not asked for its effects again.

    Raises:
        ConfigError: values that do not go with the others; tyro prints the rest itself and exits.
    """

    def attempt(words: Sequence[str], *, tell: bool) -> T:
        form = (tyro.conf.AvoidSubcommands,)
        try:
            with contextlib.nullcontext() if tell else _silence():
                found = tyro.cli(kind, args=words, default=default, prog=prog, config=form, registry=SOURCES)
        except _RefusedError as error:
            raise ConfigError(str(error)) from error
        refuse_idle(found.config, stored)
        return found

    def fault(words: Sequence[str], *, tell: bool = False) -> str | None:
        """A message; an empty one if tyro prints it."""
        try:
            attempt(words, tell=tell)
        except SystemExit:
            return ""
        except ValueError as error:
            return str(error)
        return None

    try:
        return attempt(flags, tell=False)
    except SystemExit as stop:
        if not stop.code:  # help was asked for
            return attempt(flags, tell=True)
    except ValueError:
        pass
    before = fault([])  # a file may be wrong without the flags
    guilty = [words for words in _apart(flags) if fault(words) not in (None, before)]
    good = [word for words in _apart(flags) if words not in guilty for word in words]
    faults = [fault([*good, *words], tell=True) for words in guilty]
    faults += [fault(good, tell=True)] if before is not None and guilty else []
    found = [message for message in faults if message is not None]  # some flags are wrong only without the others
    if not found:
        return attempt(flags, tell=True)
    if any(found):
        raise ConfigError("\n".join(filter(None, found)))
    sys.exit(2)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _apart(flags: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def is_yaml(word: str) -> bool:
    return Path(word).suffix in YAML_SUFFIXES
