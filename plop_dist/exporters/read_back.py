"""What a file in a target's own format adapts, whoever has written it: the way back from an export."""

from __future__ import annotations

import ast
import json
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from plop_dist.errors import ConfigError, PlopError, first_line
from plop_dist.exporters.exporter import Adapted, Exporter, find_exporter
from plop_dist.registry import EXPORTERS, names
from plop_dist.values.placement import Placement


def read_export(path: Path, placement: Placement, target: str | None = None) -> Adapted:
    """Return what a file adapts in the model of the placement.

    target: whose format it is; None: the folder's name, or what its keys say. Raises ConfigError for a file that is in
    no format, a target of another package that cannot read, and values that the target would not take.
    """
    if not path.is_file():
        raise ConfigError(f"'{path}' is no file; give one that `plop-dist export` writes, or an adapter_config.json.")
    fields = dict(flat(_tree(path)))
    likely = [target] if target else _targets_of(path, fields)
    # Two targets may have the same keys, for names of different models: it is the one whose names are known here.
    return max((_read(name, fields, path, placement) for name in likely), key=lambda found: len(found.ranks))


def _read(target: str, fields: Mapping[str, Any], path: Path, placement: Placement) -> Adapted:
    exporter = find_exporter(target)
    read = getattr(exporter, "read", None)
    if read is None:
        raise ConfigError(f"export target '{exporter.name}' of another package cannot read its files back (no `read`).")
    try:
        return read(fields, placement, str(path))
    except PlopError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ConfigError(
            f"{path} cannot be read as {exporter.name}'s ({reason}); it sets {', '.join(exporter.keys[:6])}, ... "
            "Name another target with --as."
        ) from error


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting under its dotted key; patterns of ranks and alphas are settings as a whole."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not name.endswith("_pattern"):
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def _targets_of(path: Path, fields: Mapping[str, Any]) -> list[str]:
    folder = path.absolute().parent.name
    if folder in names(EXPORTERS):
        return [folder]
    if "peft_type" in fields:
        return ["peft"]
    shares = {name: _share(find_exporter(name), fields) for name in EXPORTERS.own}
    best = max(shares.values())
    if best < 1:
        raise ConfigError(
            f"{path} has {', '.join(list(fields)[:6]) or 'no keys'}, which are no target's keys; name the target with "
            "--as."
        )
    return [name for name, share in shares.items() if share == best]


def _share(exporter: Exporter, fields: Mapping[str, Any]) -> int:
    """Return how many of the file's keys are the target's that name modules: others are in many formats."""
    return sum(10 if "target" in key or "lora_attn" in key else 1 for key in fields if key.lstrip("+") in exporter.keys)


def _tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            tree = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            tree = yaml.safe_load(text)
        elif path.suffix == ".toml":
            tree = tomllib.loads(text)
        elif path.suffix == ".py":
            tree = _call(text)
        else:
            tree = _flags(shlex.split(text))
    except (yaml.YAMLError, SyntaxError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected settings with names.")
    return tree


def _call(text: str) -> dict[str, Any]:
    """Return the arguments of the first call with any in a Python file, and under `call` what is called."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and node.keywords:
            arguments = {item.arg: ast.literal_eval(item.value) for item in node.keywords if item.arg}
            return {**arguments, "call": ast.unparse(node.func)}
    raise ValueError("there is no call in it")


def _flags(words: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, sign, value = word.removeprefix("--").partition("=")
            fields[name] = [value] if sign else []
        elif name is not None:
            fields[name].append(word)
    if not fields:
        raise ValueError("there are no --flags in it")
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
