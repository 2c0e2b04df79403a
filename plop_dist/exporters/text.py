"""How exported settings are written, so that every name arrives as it is: YAML, shell words, Hydra overrides, Python.

What is written for a shell is quoted by shlex and by nothing else; a language inside it (Hydra's, YAML) quotes first.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from plop_dist.errors import ExportError
from plop_dist.values.interpolation import literal

# What YAML, Hydra and OmegaConf all read as a string without quotes, and a shell as one plain word.
_BARE = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_PLAIN = re.compile(r"(?:[A-Za-z_*^]|\.\*)[\w.,*\\/+:-]*|\(\?!\)", re.ASCII)
_CONSTANTS = frozenset({"null", "true", "false", "nan", "inf", "yes", "no", "on", "off", "y", "n"})


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Return a tree as YAML, keys in the given order. Pasted into a shell by mistake, no name in it runs anything."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def yaml_lines(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines of yaml_text."""
    return tuple(yaml_text(tree).removesuffix("\n").split("\n"))


def toml_lines(section: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a section as TOML, a line each. Pasted into a shell by mistake, no name in it runs anything."""
    return (f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in fields.items()))


def toml_text(section: str, fields: Mapping[str, Any]) -> str:
    """Return toml_lines as the text of a file."""
    return "\n".join(toml_lines(section, fields)) + "\n"


def shell_flags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `--name value` for each field, lists separated by spaces, quoted for a shell.

    Raises ExportError for a value in a list that a command line would read as an option.
    """
    return tuple(f"--{name} {shlex.join(_words(name, value))}" for name, value in fields.items())


def shell_text(fields: Mapping[str, Any]) -> str:
    """Return shell_flags as the text of a file, a flag on each line."""
    return "\n".join(shell_flags(fields)) + "\n"


def dot_list(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `name=value` for each field, as OmegaConf's dot list reads them (values are YAML), quoted for a shell."""
    return tuple(shlex.quote(f"{name}={_yaml_scalar(value)}") for name, value in fields.items())


def omegaconf_overrides(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `name=value` for each field, as a dot list that OmegaConf resolves: what reads as a reference is none."""
    return tuple(shlex.quote(f"{name}={_yaml_value(_literal_for_omegaconf(value))}") for name, value in fields.items())


def hydra_overrides(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `name=value` overrides as Hydra parses them, quoted for a shell where it needs that."""
    return tuple(shlex.quote(f"{name}={_hydra(value)}") for name, value in fields.items())


def hydra_yaml(fields: Mapping[str, Any]) -> str:
    """Return what the overrides say as the text of a YAML file, which OmegaConf reads.

    >>> print(hydra_yaml({"a.b": 1, "+a.c": "${d}"}), end="")
    a: {b: 1, c: '\\\\${d}'}
    """
    tree: dict[str, Any] = {}
    for name, value in fields.items():
        *sections, last = name.lstrip("+").split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = _literal_for_omegaconf(value)
    return yaml_text(tree)


def python_arguments(fields: Mapping[str, Any]) -> str:
    """Return the keyword arguments of a call in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def python_list(items: Sequence[str]) -> str:
    """Return a list of strings in Python, in double quotes."""
    return f"[{', '.join(json.dumps(item, ensure_ascii=False) for item in items)}]"


def one_line(text: object) -> str:
    """Return a text for a comment: as it is, or escaped where it would not stay on its line."""
    return str(text) if str(text).isprintable() else ascii(str(text))


def number(alpha: float) -> int | float:
    """Return alpha as an integer where it is one, so that files show 32 and not 32.0."""
    return int(alpha) if alpha == int(alpha) else alpha


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes whatever means something to a shell or to another reader of YAML too."""

    def choose_scalar_style(self) -> str:
        """Return single quotes for such a string: YAML's, in which '' is a quote, are a shell's too."""
        style = super().choose_scalar_style()
        event: Any = self.event
        _, is_string = event.implicit
        return "'" if style == "" and is_string and not _PLAIN.fullmatch(event.value) else style

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        """Write a string that only escapes can hold, with all of them, also what a shell reads in double quotes."""
        self.write_indicator(f'"{"".join(map(_yaml_character, text))}"', True)


def _yaml_character(character: str) -> str:
    if character in '"\\$`' or not " " <= character <= "~":
        code = ord(character)
        return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
    return character


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, str):
        return repr(value)
    # TOML's literal strings are a shell's too; what they cannot hold is written with escapes alone.
    if "'" not in value and value.isprintable():
        return f"'{value}'"
    return f'"{"".join(map(_toml_character, value))}"'


def _toml_character(character: str) -> str:
    plain = character.isalnum() and character.isascii()
    return character if plain else f"\\U{ord(character):08X}"


def _yaml_scalar(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    return value if _is_bare(value.replace(",", "_")) else _quoted(value)


def _quoted(value: str) -> str:
    return yaml.dump(value, Dumper=_Dumper, default_style="'", width=float("inf")).removesuffix("\n")


def _yaml_value(value: Any) -> str:
    """Return a value as YAML on one line: null, booleans, numbers, texts, and lists of these."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(item if _is_bare(str(item)) else _quoted(item) for item in value)}]"
    return _yaml_scalar(value)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [str(value)]
    options = [item for item in value if str(item).startswith("-")]
    if options:
        raise ExportError(
            f"--{name} cannot take {options[0]!r}: a command line reads it as an option. Nearest choice: choose "
            "without it (placement.exclude), or export to peft."
        )
    return [str(item) for item in value]


def _hydra(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_hydra(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        if _is_bare(value):
            return value
        # Hydra takes a backslash for itself except before a quote, the closing one included.
        escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), literal(value))
        return f'"{escaped}"'
    if isinstance(value, Sequence):
        return f"[{','.join(_hydra(item) for item in value)}]"
    return str(value)


def _is_bare(text: str) -> bool:
    return _BARE.fullmatch(text) is not None and text.lower() not in _CONSTANTS


def _literal_for_omegaconf(value: Any) -> Any:
    if isinstance(value, str):
        return literal(value)
    return [_literal_for_omegaconf(item) for item in value] if isinstance(value, list) else value
