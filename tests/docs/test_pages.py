"""What the pages at the root say is so. The worked examples of CONTRIBUTING.md are run in a copy of the package."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import acrlpd
from acrlpd.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|diff)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
SUPPORT = ("tests/conftest.py", "tests/agents/conftest.py", "tests/agents/numpy_reference.py", "pyproject.toml")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package with everything that the page adds to it."""
    folder = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SUPPORT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for kind, name, text in BLOCKS:
        file = folder / name
        if kind == "python":
            assert not file.exists(), f"{name} is there already"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        else:
            file.write_text(changed(file.read_text(encoding="utf-8"), text, name), encoding="utf-8")
    return folder


def changed(content: str, diff: str, name: str) -> str:
    """``content`` after a diff whose lines may lie apart: a "+" goes behind the line above it, or takes its place."""
    lines, place = content.splitlines(), -1
    for line in diff.splitlines():
        mark, text = line[:1], line[1:]
        if mark == "+":
            place += 1
            lines.insert(place, text)
            continue
        found = [number for number, there in enumerate(lines) if there == text]
        assert len(found) == 1, f"{name}: expected once: {text!r}, found {len(found)} times"
        place = found[0]
        if mark == "-":
            del lines[place]
            place -= 1
    return "\n".join(lines) + "\n"


def test_there_is_an_example_of_everything():
    named = {name for _, name, _ in BLOCKS}
    for title in ("A robot", "A data format", "A simulator", "An extraction", "A metric"):
        section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert re.search(r"```python\n# tests/\S+\n", section), title
    assert len(named) == len(BLOCKS)


def test_every_example_works(copy):
    """In one process, as the page's own tests say."""
    tests = [name for _, name, _ in BLOCKS if name.startswith("tests/")]
    paths = os.pathsep.join([str(copy / "src"), str(copy)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = len(re.findall(r"^def test_", "".join(text for _, _, text in BLOCKS), re.MULTILINE))
    assert f"{written} passed" in done.stdout


def test_every_example_keeps_the_style(copy):
    names = sorted({name for _, name, _ in BLOCKS})
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, *names], cwd=copy, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_fast_set_is_there():
    """``make test-fast`` names files; one that is gone would be noticed only by who runs it."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = text.partition("FAST := ")[2].partition("\n\n")[0].replace("\\\n", " ")
    found: list[str] = []
    for prefix, names in re.findall(r"addprefix ([\w/]+),([\w\s]+)\)", listed):
        found += [f"tests/{prefix}{name}.py" for name in names.split()]
    found += [f"tests/{name}.py" for name in re.findall(r"(?<=\s)[\w/]*test_\w+(?=[\s)])", listed)]
    assert len(found) > 20
    assert [name for name in found if not (ROOT / name).is_file()] == []


def test_the_ladder_on_the_page_is_the_one_that_is_checked():
    content = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = tomllib.loads(content)["tool"]["importlinter"]["contracts"][0]["layers"]
    section = PAGE.partition("\n## The import ladder\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)]
    assert rows == [re.findall(r"acrlpd\.(\w+)", layer) for layer in layers]


def test_the_page_of_fields_is_what_the_declarations_say():
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "scripts" / "configuration_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == module.page(), "write it again: python scripts/configuration_page.py"
    assert re.findall(r"^\| `(\w+)` .*\|  \|$", page, re.MULTILINE) == [
        "activation"
    ]  # every other field says what it is


def test_the_versions_agree():
    """Of the package, of its metadata, of the newest release in the changelog, and of what to cite."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    released = re.findall(
        r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert acrlpd.__version__ == metadata
    assert released[0] == (metadata, cited["date-released"])
    assert cited["version"] == metadata


def test_the_readme_maps_every_module():
    """Each under its folder; the commands are files of their own names."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"```\nsrc/acrlpd/\n(.*?)```", page, re.DOTALL)[1].splitlines()
    folders: dict[str, str] = {}
    folder = ""
    for row in rows:
        folder = match[1] if (match := re.match(r"  (\w+)/ ", row)) else "" if re.match(r"  \S", row) else folder
        folders[folder] = folders.get(folder, "") + row
    package = ROOT / "src/acrlpd"
    commands = {name.replace("-", "_") for name in COMMANDS}
    modules = [file.relative_to(package) for file in sorted(package.rglob("*.py")) if file.stem != "__init__"]
    modules = [each for each in modules if each.parts[0] != "cli" or each.stem not in commands]
    missing = [
        str(each)
        for each in modules
        if not re.search(rf"(?<!\w){each.name}", folders.get(each.parts[0] if len(each.parts) > 1 else "", ""))
    ]
    assert not missing
