"""The sections of ``docs/results.md`` that benchmarks write."""

from __future__ import annotations

import re
from pathlib import Path


def write_section(path: Path, heading: str, text: str) -> None:
    """Write ``text`` under ``## heading``: replace that section, or append it at the end."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    section = f"## {heading}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", before, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        after = f"{before.rstrip()}\n\n{section}"
    else:
        rest = before[found.end() :]
        after = before[: found.start()] + section + (f"\n{rest}" if rest else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(after, encoding="utf-8")
