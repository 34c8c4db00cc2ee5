"""Code of the user's own that a configuration names (``FILE.py:NAME``, ``MODULE:NAME``): environment or extraction.

Such a name runs code. A user or a script may give one; a checkpoint or a run's folder that holds one may not use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class StoredName(str):
    """A name read from a checkpoint or a run's folder, not typed by the user.

    Code is loaded only from a plain ``str``, so a user who wants that code has to repeat its name.
    """


def names_code(text: str) -> bool:
    """Return whether ``text`` has the form ``FILE.py:NAME`` or ``MODULE:NAME``."""
    where, _, name = text.rpartition(":")
    return bool(where) and name.isidentifier()


def load(text: str, *, prefix: str = "") -> Any:
    """Run the file or import the module that ``text`` names, and return what has the name there.

    ``prefix``: what stands before such names in the option that has them, for messages.

    Raises:
        ValueError: nothing is there. Whether the name may be used at all is the caller's question.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ValueError(f"{prefix}{text}: expected {prefix}FILE.py:FUNCTION or {prefix}MODULE:FUNCTION")
    module = _from_file(Path(where), prefix) if where.endswith(".py") else importlib.import_module(where)
    if not hasattr(module, name):
        raise ValueError(f"{prefix}{text}: {where} has no function {name!r}")
    return getattr(module, name)


def _from_file(path: Path, prefix: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"{prefix}{path}: there is no such file; the path starts at the working directory, {Path.cwd()}"
        )
    spec = importlib.util.spec_from_file_location(f"custom_{path.stem}", path)  # shadows no module of that name
    assert spec is not None, "a path that ends in .py has a loader"
    assert spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there for the module they are defined in
    spec.loader.exec_module(module)
    return module
