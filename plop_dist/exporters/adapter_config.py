"""What an adapter_config.json must hold before PEFT is asked about it: every field that is read, of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plop_dist.errors import ConfigError
from plop_dist.values.files import read_json

_MOST_PATTERNS = 100  # of one field, each matched against every module; configurations have one or two
_LARGEST_RANK = 2**31


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Return the tree of an adapter_config.json. Raises ConfigError or ScoresError saying what is wrong with it."""
    target = Path(path)
    tree = read_json(target, what="adapter configuration", remedy="give the path of a PEFT adapter_config.json")
    check_adapter_config(tree, str(target))
    return tree


def check_adapter_config(tree: Any, where: str) -> None:
    """Raise ConfigError, naming field, value and expectation, unless this is a LoRA configuration that PEFT can read.

    where: what holds it, for the message.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} holds a {type(tree).__name__}, expected the object of a PEFT adapter_config.json.")
    kind = tree.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{where}: peft_type is {kind!r}; only LORA configurations can be compared.")
    if not tree.get("target_modules") and not tree.get("target_parameters"):
        raise ConfigError(
            f"{where} has neither target_modules nor target_parameters: is it a PEFT adapter_config.json?"
        )
    for field in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        _check_names(tree.get(field), field, where)
    _check_rank(tree.get("r", 8), "r", where)
    for name, rank in _mapping(tree, "rank_pattern", "rank", where).items():
        _check_rank(rank, name, where)
    alphas = _mapping(tree, "alpha_pattern", "alpha", where)
    for name, alpha in {"lora_alpha": tree.get("lora_alpha", 8), **alphas}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ConfigError(f"{where}: the alpha of {_shown(name)} is {_shown(alpha)}, expected a number.")
    _check_layers(tree, where)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in tree.get(field) or {}:
            _compile(pattern, f"{where}: {field}")


def _check_names(value: Any, field: str, where: str) -> None:
    if value is None or (isinstance(value, str) and field in ("target_modules", "exclude_modules")):
        if value:
            _compile(value, f"{where}: {field}")
    elif not isinstance(value, list | tuple | set) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {field} is {_shown(value)}, expected a list of names.")
    elif field == "modules_to_save":
        _check_patterns(value, f"{where}: {field}")


def _check_rank(rank: Any, name: str, where: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < _LARGEST_RANK:
        raise ConfigError(f"{where}: the rank of {name} is {_shown(rank)}, expected a positive integer.")


def _mapping(tree: Mapping[str, Any], field: str, what: str, where: str) -> Mapping[str, Any]:
    value = tree.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {field} is {_shown(value)}, expected an object of name to {what}.")
    return value or {}


def _check_layers(tree: Mapping[str, Any], where: str) -> None:
    layers = tree.get("layers_to_transform")
    numbers = layers if isinstance(layers, list | tuple) else [0 if layers is None else layers]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in numbers):
        raise ConfigError(f"{where}: layers_to_transform is {_shown(layers)}, expected layer numbers.")
    patterns = tree.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list | tuple | set) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{where}: layers_pattern is {_shown(tree['layers_pattern'])}, expected names.")
    _check_patterns(patterns, f"{where}: layers_pattern")


def _check_patterns(patterns: Iterable[str], where: str) -> None:
    patterns = list(patterns)
    if len(patterns) > _MOST_PATTERNS:
        raise ConfigError(f"{where} holds {len(patterns):,} names, expected at most {_MOST_PATTERNS}.")
    for pattern in patterns:
        _compile(pattern, where)


def _compile(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: {_shown(pattern)} is not a regular expression: {error}.") from None


def _shown(value: Any) -> str:
    return ascii(value)[:80]
