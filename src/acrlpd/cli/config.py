"""``acrlpd config show | diff | save``: look at configurations without a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from acrlpd import fields
from acrlpd.cli.configured import changed, parse, starting_point
from acrlpd.config import TrainConfig, to_dict
from acrlpd.files import written_whole
from acrlpd.overrides import differences, read_config, to_yaml

USAGE = """usage: acrlpd config COMMAND ...

  show  PRESET|FILE.yaml|RUN [flags] [--json]    every field: its value, and those it may have
  diff  PRESET|FILE.yaml|RUN OTHER               what differs, one field a line
  save  PRESET|FILE.yaml|RUN TARGET.yaml [flags] all fields into a file that acrlpd train takes

Flags are those of acrlpd train: any field, --algorithm NAME, --config FILE.yaml,
--environment production|development|debug."""


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Show every field of a configuration."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    json: bool = False  # one JSON object instead of YAML


def main(argv: Sequence[str]) -> int:
    command, *rest = argv or [""]
    commands: dict[str, tuple[int, Callable[[list[str]], None]]] = {
        "show": (1, _show),
        "diff": (2, _diff),
        "save": (2, _save),
    }
    if command in ("", "-h", "--help"):
        print(USAGE)
        return 0 if command else 2
    if command not in commands:
        raise ValueError(f"unknown command 'config {command}'\n{USAGE}")
    needed, run = commands[command]
    if len([word for word in rest[:needed] if not word.startswith("-")]) < needed:
        raise ValueError(f"'config {command}' needs {needed} names before any flag\n{USAGE}")
    run(rest)
    return 0


def _show(words: list[str]) -> None:
    arguments = _parsed(words[0], words[1:])
    print(json.dumps(to_dict(arguments.config), indent=2) if arguments.json else _explained(to_yaml(arguments.config)))


def _explained(text: str) -> str:
    """Return a configuration's YAML with the values that a field may have as a comment on its line."""
    parts = fields.parts(TrainConfig)
    limits = {path + name: fields.limits(hint) for path, part in parts for name, hint in fields.hints(part).items()}
    lines: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        name = line.lstrip()
        depth = (len(line) - len(name)) // 2
        path = [*path[:depth], name.partition(":")[0]]
        said = limits.get(".".join(path))
        lines.append(f"{line}  # {said}" if said else line)
    return "\n".join(lines)


def _diff(words: list[str]) -> None:
    one, other = (_parsed(word, []).config for word in words[:2])
    print("\n".join(differences(to_dict(one), to_dict(other))) or "no difference")


def _save(words: list[str]) -> None:
    target = Path(words[1])
    if target.exists():
        raise ValueError(f"{target} exists already. Delete it first, or choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = to_yaml(_parsed(words[0], words[2:]).config)
    with written_whole(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(target)


def _parsed(word: str, flags: list[str]) -> ShowArguments:
    stored = Path(word) / "config.json"
    begun = None
    if stored.is_file():
        begun = read_config(stored)
        config, flags = changed(begun, flags)
    else:
        config, flags = starting_point(word, flags)
    return parse(ShowArguments, ShowArguments(config), flags, "acrlpd config", stored=begun)
