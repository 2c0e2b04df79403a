"""What every key of the configuration means, read off the schema: for people, and for a shell that completes it."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from plop_dist.config.json_schema import json_schema, section_of
from plop_dist.errors import ConfigError

_WORD = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
_BOUND = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
# What people put there, where the default or the choices do not say it.
_EXAMPLES = {
    "run_dir": "runs/gsm8k",
    "model.name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "model.checkpoint": "checkpoints/step-1000",
    "data.path": "rows.jsonl",
    "data.text_field": "text",
    "data.template": "{question}\\n{answer}",
    "data.messages_field": "messages",
    "data.num_samples": "64",
    "data.max_length": "512",
    "parallel.tp": "2",
    "parallel.pp": "2",
    "parallel.dp": "8",
    "placement.k": "2",
    "placement.threshold": "1.1",
    "placement.max_trainable_parameters": "1000000",
    "placement.rank": "32",
    "placement.rank_pattern": "{v_proj: 32}",
    "placement.include": "[q_proj,v_proj]",
    "placement.exclude": "[lm_head,q_proj]",
    "train.max_steps": "1000",
    "train.prompt_template": "{question}\\n",
    "train.data_path": "train.jsonl",
    "train.eval_path": "held-out.jsonl",
    "train.track_nfn_every": "50",
    "export.engine": "megatron",
    "cluster.address": "head-node:6379",
    "cluster.num_workers": "8",
}
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
            found.append(
                Section(name, section["description"], tuple(_keys(schema, name, section["properties"], required)))
            )
    return (Section("", "Outside the sections.", tuple(outside)), *found)


def _keys(schema: dict[str, Any], name: str, nodes: dict[str, Any], required: Container[str]) -> Iterator[Key]:
    """Return the keys of a section, and those of sections within it."""
    for field, node in nodes.items():
        inner = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
        if "properties" in inner:
            yield from _keys(schema, f"{name}.{field}", inner["properties"], inner.get("required", ()))
        else:
            yield _key(f"{name}.{field}", node, field in required)


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


def explained(name: str | None) -> list[str]:
    """Return lines on a key (its field's name is enough), on the keys of a section, or on all of them.

    Raises ConfigError, with the key that was meant, for a name that is neither.
    """
    found = [(section, key) for section in sections() for key in section.keys if name in (key.name, key.field)]
    if found:
        return [line for section, key in found for line in [*_lines(section, key), ""]][:-1]
    listed = [section for section in sections() if name in (None, section.name)]
    if not listed:
        keys = [key.name for section in sections() for key in section.keys]
        fields = {key.rpartition(".")[2]: key for key in keys}
        near = difflib.get_close_matches(str(name), [*keys, *fields], n=1, cutoff=0.6)
        meant = f"Did you mean '{fields.get(near[0], near[0])}'? " if near else ""
        raise ConfigError(
            f"KEY is '{name}', which the configuration does not have. {meant}`plop-dist config` lists all."
        )
    width = max(len(key.name) for section in listed for key in section.keys)
    lines = []
    for section in listed:
        lines += [f"{section.name}: {section.doc}" if section.name else section.doc]
        lines += [f"  {key.name:<{width}}  {key.doc}" for key in section.keys]
    return lines


def example(key: Key) -> str:
    """Return a value that the key takes, as YAML: not the default, where there is another that is likely."""
    if key.name in _EXAMPLES:
        return _EXAMPLES[key.name]
    others = [choice for choice in key.choices if choice not in (key.default, "null", "auto")]
    return others[0] if others else str(key.default)


def _lines(section: Section, key: Key) -> list[str]:
    default = "none: it must be given" if key.default is None else key.default
    override = shlex.quote(f"{key.name}={example(key)}")
    return [
        key.name,
        f"  is       {key.doc}",
        f"  section  {section.name}: {section.doc}" if section.name else f"  section  {section.doc}",
        f"  takes    {key.values.replace('`', '')}",
        f"  default  {default}",
        f"  example  plop-dist check config.yaml {override}",
    ]


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
