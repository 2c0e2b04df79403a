"""A configuration to start from: for a model and data of the user's, with every key explained, or the quickstart."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from plop_dist.config.reference import Section, sections, yaml_value
from plop_dist.errors import ConfigError, suggest
from plop_dist.values.files import write_text

_WIDTH = 100


def starter(given: Mapping[str, Any]) -> str:
    """Return a commented configuration; `given` are values of dotted keys, which it sets.

    Every other key stands behind a # with its default, so that removing the # changes nothing yet.
    """
    head = "# A configuration of plop-dist. A key behind a # shows its default; remove the # to change it."
    return "\n\n".join([head, *(_section_text(section, given) for section in sections())]) + "\n"


def quickstart() -> str:
    """Return the configuration of the demo: a small model, data and a training that need no download from a hub."""
    return files("plop_dist.config").joinpath("quickstart.yaml").read_text(encoding="utf-8")


def samples() -> dict[str, str]:
    """Return what each sample is for, by name: the first line of its file, a configuration or a script."""
    first = {name: file.read_text(encoding="utf-8").partition("\n")[0] for name, file in _samples().items()}
    return {name: line.strip('# "') for name, line in first.items()}


def sample(name: str) -> tuple[str, str]:
    """Return a sample's file name and text. Raises ConfigError, with what there is, for an unknown name."""
    files_by_name = _samples()
    if name not in files_by_name:
        raise ConfigError(f"--sample is '{name}', which is no sample. {suggest(name, samples())}")
    return files_by_name[name].name, files_by_name[name].read_text(encoding="utf-8")


def _samples() -> dict[str, Traversable]:
    found = sorted(files("plop_dist.config").joinpath("samples").iterdir(), key=lambda file: file.name)
    return {Path(file.name).stem: file for file in found if Path(file.name).suffix in (".yaml", ".py")}


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet. Raises ConfigError where it is, RunDirError where it cannot be written."""
    if path.exists():
        raise ConfigError(f"--output {path} exists already; remove it or choose another --output.")
    write_text(path, text)


def _section_text(section: Section, given: Mapping[str, Any]) -> str:
    lines = [*_comment(section.doc), f"{section.name}:"] if section.name else []
    above = section.name.split(".")
    for key in section.keys:
        *path, _ = key.name.split(".")
        if len(path) > 1 and path != above:  # a section within this one
            lines.append(f"{'  ' * (len(path) - 1)}#{path[-1]}:")
        above, indent = path, "  " * len(path)
        value = yaml_value(given[key.name]) if key.name in given else key.default
        assert value is not None, f"{key.name} has no default and is not given"
        lines += [f"{indent}{line}" for line in _comment(_with_choices(key.doc, key.choices))]
        lines.append(f"{indent}{'' if key.name in given else '#'}{key.field}: {value}")
    return "\n".join(lines)


def _with_choices(doc: str, choices: tuple[str, ...]) -> str:
    listed = [choice.strip("[]") for choice in choices if choice not in ("true", "false", "null")]
    return f"{doc} ({' | '.join(listed)})" if listed else doc


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 4)]
