"""What a value should have been, in our own words, from an error of pydantic's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_BOUNDS = {
    "greater_than_equal": ("ge", "greater than or equal to"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "less than or equal to"),
    "less_than": ("lt", "less than"),
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, e.g. [a, b]",
    "tuple": "a list, e.g. [a, b]",
    "dict": "a mapping, e.g. {a: 1}",
    "model": "a mapping",
    "decimal": "a number",
    "path": "a path",
}
_OTHERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "finite_number": lambda ctx: "a finite number",
    "string_too_short": lambda ctx: f"text of at least {_counted(ctx['min_length'], 'character')}",
    "string_too_long": lambda ctx: f"text of at most {_counted(ctx['max_length'], 'character')}",
    "string_unicode": lambda ctx: "whole Unicode text",
    "int_parsing_size": lambda ctx: "a whole number that 64 bits hold",
    "too_short": lambda ctx: f"at least {_counted(ctx['min_length'], 'entry')}",
    "too_long": lambda ctx: f"at most {_counted(ctx['max_length'], 'entry')}",
    "literal_error": lambda ctx: f"one of {ctx['expected'].replace(' or ', ', ')}",
    "missing": lambda ctx: "a value, and there is none",
    "extra_forbidden": lambda ctx: "no such key",
}


def expected(error: Mapping[str, Any]) -> str:
    """Return what one entry of ValidationError.errors() wants to have: `a number greater than 0`, `text`."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        field, words = _BOUNDS[kind]
        return f"a number {words} {context[field]}"
    if kind in _OTHERS:
        return _OTHERS[kind](context)
    if kind == "value_error":
        return str(context.get("error", error["msg"].removeprefix("Value error, ")))
    family = kind.partition("_")[0]
    return _KINDS.get(family, "another kind of value")


def _counted(number: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"
