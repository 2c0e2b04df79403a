"""What becomes of `${...}` in a configuration: values to go on with, and references, which are kept instead of values.

A reference is a text that calls a resolver, as `${oc.env:X}` does. It is followed in a configuration that the user
gives, and never in one that a run has left behind, which may be somebody else's. `${data.path}` is followed in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plop_dist.errors import ConfigError
from plop_dist.values.interpolation import MARK, literal, mark_calls, unmarked
from plop_dist.values.visible import strings

_RESULTS = ("scores.json", "placement.json", "stages.json", "events.jsonl", "command.txt")


def is_kept_by_run(file: Path) -> bool:
    """Tell whether a configuration is the one that a run keeps beside its results."""
    return file.name == "config.yaml" and any((file.parent / name).exists() for name in _RESULTS)


def without_calls(tree: Any) -> Any:
    """Return a copy in which nothing calls a resolver any more."""
    from omegaconf import OmegaConf

    return OmegaConf.create(_mapped(OmegaConf.to_container(tree, resolve=False), mark_calls))


@dataclass(frozen=True)
class Followed:
    """The values of all keys, and by dotted keys which of them are references, and which of these have no value."""

    values: dict[str, Any]
    references: dict[str, str]
    unfollowed: dict[str, str]


def follow(tree: Any) -> Followed:
    """Return what the keys of a configuration stand for.

    A value that comes from a reference by way of other keys counts as one too. What `without_calls` has marked is a
    reference that has no value.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    kept = OmegaConf.to_container(without_calls(tree), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    named = _mapped({str(key): value for key, value in values.items()}, lambda text: text.replace(MARK, "$"))
    return Followed(named, _marked(kept), _marked(values))


def check_followed(unfollowed: Mapping[str, str], source: str) -> None:
    """Raise ConfigError for a reference of a stored configuration whose value is needed."""
    for key, text in unfollowed.items():
        raise ConfigError(
            f"{source}: {key} is {text}, which is not followed in a configuration that a run has left behind; give "
            f"{key}=... on the command line, or use the configuration that the run was made from."
        )


def replaced(tree: Any, references: Mapping[str, str], prefix: str = "") -> Any:
    """Return a tree of values with the references in place of what they stand for."""
    if prefix in references:
        return references[prefix]
    if isinstance(tree, Mapping):
        return {key: replaced(value, references, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [replaced(value, references, f"{prefix}.{index}") for index, value in enumerate(tree)]
    return tree


def yaml_text(values: Any, references: Mapping[str, str]) -> str:
    """Return the YAML of a configuration that reads as the same values, with its references."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(replaced(_mapped(values, literal), references)))


def digest(value: Any, key: str) -> str:
    """Return a text that tells whether a reference still stands for the same, and takes long to be guessed from."""
    return hashlib.scrypt(repr(value).encode(), salt=key.encode(), n=2**14, r=8, p=1, dklen=8).hex()


def _marked(tree: Any) -> dict[str, str]:
    return {key: unmarked(text) for key, text in strings(tree) if MARK in text}


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
