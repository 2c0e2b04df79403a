"""What every key of the configuration means, read off the schema: for people, and for a shell that completes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from plop_dist.config.json_schema import json_schema, section_of

_WORD = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
_BOUND = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_LARGE = 2**20  # a bound of this size says what a computer can hold, which is no news to anyone


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    name: dotted, `data.num_samples`; default: as YAML, None where the key must be given; values: what it takes, in
    words; choices: the values themselves, as YAML, where they can be listed; doc: one line on it.
    """

    name: str
    default: str | None
    values: str
    choices: tuple[str, ...]
    doc: str

    @property
    def field(self) -> str:
        """The name within its section."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Section:
    """One section of the configuration, what it is about, and its keys; the name is "" for keys outside of any."""

    name: str
    doc: str
    keys: tuple[Key, ...]


def sections() -> tuple[Section, ...]:
    """Return the sections in the schema's order, the keys outside of any first."""
    schema = json_schema()
    outside, found = [], []
    for name, node in schema["properties"].items():
        section = section_of(schema, name)
        if section is None:
            outside.append(_key(name, node, name in schema["required"]))
        else:
            required = section.get("required", ())
            keys = (_key(f"{name}.{field}", child, field in required) for field, child in section["properties"].items())
            found.append(Section(name, section["description"], tuple(keys)))
    return (Section("", "Outside the sections.", tuple(outside)), *found)


def markdown() -> str:
    """Return every key as Markdown tables, one per section: key, default, values, meaning."""
    lines = []
    for section in sections():
        lines += [f"### {section.name}", "", section.doc, ""] if section.name else []
        lines += ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
        for key in section.keys:
            default = "required" if key.default is None else f"`{key.default}`"
            cells = (f"`{key.name}`", default, key.values, key.doc)
            row = " | ".join(cell.replace("|", r"\|") for cell in cells)
            lines.append(f"| {row} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def completions(incomplete: str, only: str = "") -> Iterator[tuple[str, str]]:
    """Yield what a `key=value` that is being typed can become, each with a word on it: keys first, then values.

    With `only` just the keys of that section, whose name may be left out.
    """
    name, is_value, value = incomplete.partition("=")
    for key in (key for section in sections() if section.name.startswith(only) for key in section.keys):
        for spelling in (key.field, key.name) if only else (key.name,):
            if is_value and spelling == name:
                yield from ((f"{name}={choice}", key.doc) for choice in key.choices if choice.startswith(value))
            elif not is_value and spelling.startswith(name):
                yield f"{spelling}=", key.doc


def yaml_value(value: Any) -> str:
    r"""Return a value as YAML on one line.

    >>> yaml_value("a b"), yaml_value("{x}\n"), yaml_value(None), yaml_value(["lm_head"]), yaml_value(0.0002)
    ('a b', '"{x}\\n"', 'null', '[lm_head]', '0.0002')
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    # a text that YAML quotes is more readable as JSON writes it, which YAML reads too
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and text != value else text


def _key(name: str, node: dict[str, Any], is_required: bool) -> Key:
    default = None if is_required else yaml_value(node["default"])
    return Key(name, default, _values(node), tuple(_choices(node)), node["description"])


def _values(node: dict[str, Any]) -> str:
    """Return what a key takes, in words, from its part of the JSON schema."""
    if "anyOf" in node:
        return " or ".join(_values(choice) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        return f"list of {_values(node['items'])}"
    if node["type"] == "object":
        inner = node.get("additionalProperties")
        return f"mapping of text to {_values(inner)}" if isinstance(inner, dict) else "mapping"
    bounds = [f"{sign} {node[name]:g}" for name, sign in _BOUND.items() if abs(node.get(name, _LARGE)) < _LARGE]
    return " ".join([_WORD[node["type"]], ", ".join(bounds)]).strip()


def _choices(node: dict[str, Any]) -> list[str]:
    if "anyOf" in node:
        return [value for choice in node["anyOf"] for value in _choices(choice)]
    if "enum" in node or "const" in node:
        return [yaml_value(value) for value in node.get("enum", [node.get("const")])]
    if node.get("type") == "array":
        return [f"[{value}]" for value in _choices(node["items"])]
    return {"boolean": ["true", "false"], "null": ["null"]}.get(node.get("type", ""), [])
