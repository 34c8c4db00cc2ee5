"""Write docs/configuration.md from the declarations of the fields: ``python scripts/configuration_page.py``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

from acrlpd import fields
from acrlpd.config import TrainConfig
from acrlpd.data.formats.options import DataSource, ReaderOptions

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every field of a run, the values it may have, and its default; presets set others (`acrlpd config show PRESET`). A field
is a flag (`--agent.discount 0.95`), a name in a YAML file (`--config FILE.yaml`), and an attribute of `TrainConfig`.
This page is written from the declarations by `python scripts/configuration_page.py`.
"""


def page() -> str:
    """Return the page: one table for each part, in the order of the configuration."""
    places: dict[type, list[str]] = {}
    for path, part in [*fields.parts(TrainConfig), ("data.sources.", DataSource)]:
        places.setdefault(part, []).append(path)
    return HEAD + "".join(line for part, paths in places.items() for line in table(part, paths))


def table(part: type, paths: list[str]) -> Iterator[str]:
    """Yield the lines about one part; those of a data set leave out what they share with ``data``."""
    shared = fields.hints(ReaderOptions) if part is DataSource else {}
    hints = {name: hint for name, hint in fields.hints(part).items() if fields.dataclass_in(hint) is None}
    rows = [row(part, name, hint) for name, hint in hints.items() if name not in shared]
    if not rows:
        return
    title = ", ".join(f"`{path.rstrip('.')}`" for path in paths if path) or "The run"
    text = " ".join(inspect.cleandoc(part.__doc__ or "").split()).replace("``", "`")
    yield f"\n## {title}\n\n{text}\n\n| field | values | default | meaning |\n| --- | --- | --- | --- |\n"
    yield from rows


def row(part: type, name: str, hint: object) -> str:
    (field,) = (each for each in dataclasses.fields(part) if each.name == name)
    cells = (f"`{name}`", fields.allowed(hint), f"`{field.default!r}`", fields.comments(part).get(name, ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
