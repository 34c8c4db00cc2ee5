"""The values that the fields of a dataclass may have: declared with the field, checked and described in one place.

    @dataclasses.dataclass(frozen=True)
    class Options:
        rate: Annotated[float, Interval("(0, 1]")] = 0.5  # share of the steps that are kept
        episodes: PositiveInt | None = None

        def __post_init__(self):
            fields.check(self)

The declaration is the type. Errors, ``--help``, ``acrlpd config show`` and docs/configuration.md take their words from
it. Rules that concern several fields are written after ``check``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from one bound to the other, as ``"(0, 1]"``: a round bracket leaves its bound out."""

    text: str

    @functools.cached_property
    def bounds(self) -> tuple[float, float]:
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, number: float) -> bool:
        low, high = self.bounds
        above = number > low if self.text[0] == "(" else number >= low
        return above and (number < high if self.text[-1] == ")" else number <= high)

    def __str__(self) -> str:
        low, high = self.bounds
        if high < math.inf or low == -math.inf:
            return f"in {self.text}"
        start = f"{'above' if self.text[0] == '(' else 'of at least'} {low:g}"
        return start if self.text[-1] == ")" else f"{start} (inf too)"


class _NotEmpty:
    def __repr__(self) -> str:
        return "NOT_EMPTY"


NOT_EMPTY = _NotEmpty()
"""Marks a tuple that must have at least one item."""

PositiveInt = Annotated[int, Interval("[1, inf)")]
NonNegativeInt = Annotated[int, Interval("[0, inf)")]
PositiveFloat = Annotated[float, Interval("(0, inf)")]
NonNegativeFloat = Annotated[float, Interval("[0, inf)")]
Share = Annotated[float, Interval("[0, 1]")]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "None"}


def check(config: Any, *, without: tuple[str, ...] = ()) -> None:
    """Refuse a dataclass with a value that its field does not allow; fields ``without`` are not looked at.

    A NumPy number becomes Python's: it could not be written to a file, and gives its own dtype to what it is used with.

    Raises:
        ValueError: one line for each such field, with its name, what is allowed and what it is.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    cls: type = type(config)
    names = [name for name in values if name not in without]
    problems = [fault for name in names for fault in faults(hints(cls)[name], values[name], name)]
    if problems:
        raise ValueError("\n".join(problems))
    for name in names:
        if (plain := _plain(values[name])) is not values[name]:
            object.__setattr__(config, name, plain)


def _plain(value: Any) -> Any:
    if type(value) is tuple and any(isinstance(item, np.generic | tuple) for item in value):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Return the types of all fields, with what is declared about them."""
    return typing.get_type_hints(cls, include_extras=True)


def faults(hint: Any, value: Any, name: str) -> list[str]:
    """Return one line for each part of ``value`` that a field ``name`` of this type may not have."""
    options = alternatives(hint)
    if any(not _faults(option, value, name) for option in options):
        return []
    if isinstance(value, tuple):
        sequences = [option for option in options if typing.get_origin(_bare(option)[0]) is tuple]
        if len(sequences) == 1:
            return _faults(sequences[0], value, name)
    return [_message(hint, value, name)]


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the options of a union; another type is its only option."""
    kind, _ = _bare(hint)
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (hint,)


def allowed(hint: Any) -> str:
    """Return in words what a field of this type may hold, such as "a number in (0, 1] or None"."""
    words = [_allowed(option) for option in alternatives(hint)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def limits(hint: Any) -> str:
    """Return what ``allowed`` says if a range or choices are declared; empty if every value of the type is allowed."""
    return allowed(hint) if _is_limited(hint) else ""


def _is_limited(hint: Any) -> bool:
    pairs = [_bare(option) for option in alternatives(hint)]
    items = [item for kind, _ in pairs if typing.get_origin(kind) is tuple for item in typing.get_args(kind)]
    return any(declared or typing.get_origin(kind) is Literal for kind, declared in pairs) or any(
        _is_limited(item) for item in items
    )


def parts(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Yield a dataclass and those inside it, each after what stands before its fields' names ("agent.critic.")."""
    yield path, cls
    for name, hint in hints(cls).items():
        if (inner := dataclass_in(hint)) is not None:
            yield from parts(inner, f"{path}{name}.")


def kinds(hint: Any) -> tuple[Any, ...]:
    """Return the options of a type without what is declared about them."""
    return tuple(_bare(option)[0] for option in alternatives(hint))


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of a field that holds one, optional or not."""
    return next((kind for kind in kinds(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def items_of(hint: Any, count: int) -> tuple[Any, ...] | None:
    """Return the types of ``count`` items of the tuple among the options; None if there is no tuple of this length."""
    for kind in kinds(hint):
        if typing.get_origin(kind) is tuple:
            items = typing.get_args(kind)
            items = items[:1] * count if items[-1] is Ellipsis else items
            return items if len(items) == count else None
    return None


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """Return the comment beside or above each field that has one; fields of a base class are there, too."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            found |= _comments_in(textwrap.dedent(inspect.getsource(each)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    said = {each.start[0]: each.string.lstrip("# ") for each in tokens if each.type == tokenize.COMMENT}
    alone = {line for line in said if source.splitlines()[line - 1].lstrip().startswith("#")}
    (definition,) = ast.parse(source).body
    found = {}
    for node in getattr(definition, "body", []):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        if text := " ".join(said[line] for line in lines if line in said):
            found[node.target.id] = text
    return found


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without what is declared about it, and that."""
    if typing.get_origin(hint) is Annotated:
        kind, *declared = typing.get_args(hint)
        return kind, tuple(declared)
    return hint, ()


def _message(hint: Any, value: Any, name: str) -> str:
    choices = [choice for option in alternatives(hint) for choice in _choices(option)]
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint_at = f": did you mean {near[0]!r}?" if near else ""
    if isinstance(value, list) and items_of(hint, len(value)) is not None:
        hint_at = ": in Python it is a tuple"
    return f"{name} must be {allowed(hint)}, got {value!r:.200}{hint_at}"


def _choices(hint: Any) -> tuple[Any, ...]:
    kind, _ = _bare(hint)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _faults(hint: Any, value: Any, name: str) -> list[str]:
    """Return what is wrong with a value of a type that is no union."""
    kind, declared = _bare(hint)
    if typing.get_origin(kind) is tuple and isinstance(value, tuple):
        items = items_of(kind, len(value))
        if items is not None and (value or NOT_EMPTY not in declared):
            pairs = enumerate(zip(items, value, strict=True))
            return [fault for place, (item, part) in pairs for fault in faults(item, part, f"{name}[{place}]")]
    elif _is_a(kind, declared, value):
        return []
    return [_message(hint, value, name)]


def _is_a(kind: Any, declared: tuple[Any, ...], value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if kind in (int, float):
        number: Any = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        intervals = [each for each in declared if isinstance(each, Interval)] or [Interval("(-inf, inf)")]
        return isinstance(value, number) and not isinstance(value, bool) and all(value in each for each in intervals)
    return isinstance(value, kind) if isinstance(kind, type) else typing.get_origin(kind) is not tuple


def _allowed(hint: Any) -> str:
    kind, declared = _bare(hint)
    if choices := _choices(hint):
        return ", ".join(map(repr, choices[:-1])) + (" or " if choices[:-1] else "") + repr(choices[-1])
    if typing.get_origin(kind) is tuple:
        each, *others = typing.get_args(kind)
        few = "" if Ellipsis in others else f" of {1 + len(others)}"
        start = f"{'a non-empty' if NOT_EMPTY in declared else 'a'} list{few}"
        return f"{start} (each item {allowed(each)})"
    if kind not in _WORDS:
        return f"a group of fields ({kind.__name__})" if dataclass_in(kind) else str(kind)
    return " ".join([_WORDS[kind], *(str(each) for each in declared if isinstance(each, Interval))])
