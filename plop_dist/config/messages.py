"""What is wrong with a key of the configuration, in one sentence, with the key that was meant."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from plop_dist.errors import PlopError, suggest
from plop_dist.values.expected import expected

_MOST_CHARACTERS = 300


def explain(item: Any, root: type[BaseModel]) -> str:
    """Return what is wrong with one key, from a pydantic error of validating `root`: key, found, expected, remedy."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        elsewhere = [f"{name}.{location[-1]}" for name in root.model_fields if _field_at([name, location[-1]], root)]
        if len(elsewhere) == 1 and len(location) == 1:
            return f"unknown key '{key}'. Did you mean '{elsewhere[0]}'?"
        return f"unknown key '{key}'. {suggest(location[-1], _keys_beside(location, root))}"
    if item["type"] == "missing":
        return f"key '{key}' is required and missing; add {key}: ... to the file or {key}=... to the command."
    if isinstance(own := item.get("ctx", {}).get("error"), PlopError):
        return f"{'.'.join(part for part in location if not part.isdecimal())}: {own}"
    field = _field_at(location, root)
    doc = f" ({field.description})" if field is not None and field.description else ""
    if item["type"] == "model_type":
        keys = ", ".join(_keys_beside([*location, ""], root))
        return f"{key}: the value is {_shown(item['input'])}, expected a section with the keys {keys}."
    near = _near(item["input"], field) if item["type"] == "literal_error" else ""
    return f"{key}: expected {expected(item)}, but the value is {_shown(item['input'])}{near}{doc}"


def _near(value: Any, field: Any) -> str:
    if not isinstance(value, str):
        return ""
    choices = [str(choice) for choice in get_args(field.annotation)] if field is not None else []
    found = difflib.get_close_matches(value, choices, n=1, cutoff=0.6)
    return f". Did you mean '{found[0]}'?" if found else ""


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _keys_beside(location: list[str], root: type[BaseModel]) -> list[str]:
    section: type[BaseModel] = root
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return list(section.model_fields)


def _field_at(location: list[str], root: type[BaseModel]) -> Any:
    section: type[BaseModel] = root
    field = None
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            return None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
    return field
