"""How exported settings are written: YAML text, shell flags, Hydra overrides."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Return a tree as YAML, keys in the given order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, default_flow_style=None, width=100)


def shell_flags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `--name value` for each field, lists separated by spaces, quoted for a shell."""
    return tuple(f"--{name} {_shell(value)}" for name, value in fields.items())


def hydra_overrides(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `name=value` overrides as Hydra and OmegaConf parse them, quoted for a shell where it needs that."""
    return tuple(_quote(f"{name}={_hydra(value)}") for name, value in fields.items())


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree from dotted names.

    >>> nested({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for name, value in fields.items():
        *sections, last = name.lstrip("+").split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def _quote(override: str) -> str:
    # Readable where it can be: Hydra's own quotes are single ones, and nothing exported is special inside double ones.
    return f'"{override}"' if "'" in override else shlex.quote(override)


def _shell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(shlex.quote(str(item)) for item in value)
    return shlex.quote(str(value))


def _hydra(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # `*` means something to Hydra's grammar; no name that is exported this way holds a quote or a backslash.
        return value if re.fullmatch(r"[\w.]+", value) else f"'{value}'"
    if isinstance(value, Sequence):
        return f"[{','.join(_hydra(item) for item in value)}]"
    return str(value)
