"""Every command and every flag with a value that the documents name is accepted by the parser it is for."""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import tyro
from tests.cli.test_every_flag import COMMANDS, ORIGINAL, flags_of
from tests.training.looks import leaves

from acrlpd import presets
from acrlpd.cli.idle import refuse_idle
from acrlpd.cli.main import main
from acrlpd.config import TrainConfig, to_dict
from acrlpd.deploy import improving

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TAKEN_BEFORE = {"config", "algorithm", "environment"}  # by other than the parser
PLACEHOLDERS = {"PRESET": "demo", "NAME": "bc"}
STARTS = {
    "train": ["train demo", "train aloha", "train demo --rollout.num_workers 2"],
    "collect": ["collect --output there", "collect --output there --checkpoint there"],
}


class Parsed(BaseException):
    """The parser was content; the command does nothing."""


class Refused(BaseException):
    """The parser was not; nothing else is tried."""


def stop_behind_the_parser(real, together, *arguments, **options):
    try:
        found = real(*arguments, **options)
        if together and isinstance(getattr(found, "config", None), TrainConfig):
            refuse_idle(found.config)
    except (SystemExit, ValueError) as error:
        raise Refused(f"{error}") from error
    raise Parsed


def accepted(words: list[str], *, together: bool = True) -> str | None:
    """What is wrong with a command line; None if nothing is. Not ``together``: it has some of its flags alone."""
    with contextlib.ExitStack() as patches:
        for module, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
            parser = functools.partial(stop_behind_the_parser, getattr(module, name), together)
            patches.enter_context(mock.patch.object(module, name, parser))
        patches.enter_context(mock.patch.object(improving, "open_original", return_value=ORIGINAL))
        try:
            code = main(words)
        except Parsed:
            return None
        except Refused as error:
            return str(error)
    return f"exit code {code}" if code else None


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """Those in blocks of code, and those in the text that have flags."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text_of(page), re.DOTALL)
    lines = [line for language, block in blocks if language in ("", "bash") for line in unwrapped(block)]
    spans = [span for span in inline(page) if " --" in span]
    return [line for line in [*lines, *spans] if line.startswith("acrlpd ") and "--help" not in line]


def unwrapped(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def inline(page: Path) -> list[str]:
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def flags(page: Path) -> list[str]:
    """``--flag value`` in the text; of values that are offered side by side, each; also in remarks of blocks."""
    remarks = re.findall(r"#.*?\((--[^)]*)\)", text_of(page))
    offered = [span for span in [*inline(page), *remarks] if re.match(r"--[\w-]", span) and not span.endswith(".")]
    return [f"{said.split()[0]} {value}".strip() for said in offered for value in alternatives(said)]


def alternatives(said: str) -> list[str]:
    _, _, values = said.partition(" ")
    return [values] if "{" in values else re.split(r" ?\| ?|, | or ", values)


def table_values() -> list[str]:
    """Values in the table of ``--data.`` options, each with the options of its row."""
    rows = re.findall(
        r"^\| (`[^|]*) \| (.*) \|$", text_of(ROOT / "docs/data.md").partition("## Choosing")[2], re.MULTILINE
    )
    rows = rows[: next(number for number, (left, _) in enumerate(rows) if "norm_stats" in left)]
    found = []
    for left, right in rows:
        options = re.findall(r"`([\w.]+)`", left)
        section = options[0].rpartition(".")[0] if options else ""
        options = [f"{section}{option}" if option.startswith(".") else option for option in options]
        found += [f"{' '.join(options)} = {value}" for value in re.findall(r"`([^`]+)`", right)]
    return found


DOCUMENTED = sorted({(page.name, line) for page in PAGES for line in commands(page)})
FLAGS = sorted({(page.name, flag) for page in PAGES for flag in flags(page)})


def names(flag: str) -> str:
    return re.sub(r"(^|\.)no_", r"\1", flag.removeprefix("--").replace("-", "_"))


@functools.cache
def fields(command: str) -> set[str]:
    found = {
        name.rpartition(".")[2] if "protocol" not in name else name for name in flags_of(COMMANDS[command].arguments)
    }
    return found | (set(leaves(WHOLE)) if command in ("train", "plan", "config show") else set())


WHOLE = dataclasses.replace(presets.get_preset("demo"), online_loss_weights=presets.LossWeights())


def flags_of_scripts() -> set[str]:
    """Of benchmarks and examples, whose parsers belong to them."""
    files = [file for folder in ("benchmarks", "examples", "scripts") for file in (ROOT / folder).rglob("*.py")]
    return {names(flag) for file in files for flag in re.findall(r'"(--[\w-]+)"', file.read_text(encoding="utf-8"))}


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """With the files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "changes.yaml"):
        Path(name).write_text("base_config: droid\n" if name == "mine.yaml" else "seed: 3\n")
    for step in ("", "checkpoints/2000"):
        Path("runs/mine", step).mkdir(parents=True, exist_ok=True)
    Path("runs/mine/config.json").write_text(json.dumps(to_dict(presets.get_preset("demo"))))
    files = {name for page in PAGES for name in re.findall(r"[\w/]+\.yaml", text_of(page))}
    for name in {*files, "FILE.yaml"} - {"mine.yaml", "changes.yaml"}:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("base_config: demo\n")


@pytest.mark.parametrize(("page", "line"), DOCUMENTED)
def test_a_documented_command_is_accepted(page, line):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
    if words[:2] == ["config", "diff"]:
        assert [accepted(["config", "show", name]) for name in words[2:]] == [None, None]
    elif words[:2] == ["config", "save"]:
        assert accepted(["config", "show", words[2], *words[4:]]) is None
    else:
        assert accepted(words) is None


@pytest.mark.parametrize(("page", "said"), FLAGS)
def test_a_documented_value_is_accepted(page, said):
    """By one command that has the flag, at least."""
    flag, *values = shlex.split(said)
    name = names(flag)
    own = ["train"] if name in TAKEN_BEFORE else [command for command in COMMANDS if name in fields(command)]
    if not own or not values:
        assert own or name in flags_of_scripts(), f"no command has {flag}"
        return
    starts = [words for command in own for words in STARTS.get(command, [f"{command} {COMMANDS[command].words}"])]
    assert any(accepted([*shlex.split(words), flag, *values], together=False) is None for words in starts)


@pytest.mark.parametrize("said", table_values())
def test_a_value_in_the_table_of_options_is_one(said):
    options, _, value = said.partition(" = ")
    tries = (["train", "demo", f"--data.{option}", value] for option in options.split())
    assert any(accepted(words, together=False) is None for words in tries)
