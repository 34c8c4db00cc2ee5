"""Sizes of a model as text, ``width 64, depth 2``: the name of a variant that has no other."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping


def spell(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def is_spelled(text: str) -> bool:
    """Return whether ``text`` has the form of ``spell``, rather than being a name."""
    return re.fullmatch(r"\w+ \d+(, \w+ \d+)*", text.strip()) is not None


def read(text: str, known: Collection[str], what: str) -> dict[str, int]:
    """Return the sizes that ``text`` spells.

    Raises:
        ValueError: a size is not one of ``known``, or is there twice; ``what`` is what they are sizes of.
    """
    pairs = [part.split() for part in text.split(",")]
    sizes = {key: int(value) for key, value in pairs}
    wrong = sorted(sizes.keys() - set(known))
    if wrong or len(sizes) < len(pairs):
        raise ValueError(
            f"{what} {text!r}: expected each of {', '.join(known)} at most once"
            + (f", found {wrong[0]}" if wrong else "")
        )
    return sizes
