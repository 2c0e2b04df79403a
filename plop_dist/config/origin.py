"""Where a value of the configuration was given: the line of the file, or the override on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plop_dist.values.secret_texts import secret_part, without_secrets

_MOST_CHARACTERS = 60
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")


@dataclass(frozen=True)
class Origin:
    """Where the keys of one configuration come from.

    file: its name; lines: the line of each key in it, by dotted name; overrides: what was typed for a key, as it was.
    """

    file: str
    lines: Mapping[str, int]
    overrides: Mapping[str, str]

    def located(self, message: str) -> str:
        """Return the lines of an error message, each beginning with the file, with where its key was given.

        An override comes before the file: what goes with what is usually upset by what was given last.
        """
        return "\n".join(self._located(line) for line in message.split("\n"))

    def _located(self, line: str) -> str:
        head = f"{self.file}: "
        if not line.startswith(head):
            return line
        text = line.removeprefix(head)
        keys = _KEY.findall(text)
        for key in keys:
            name = _nearest(key, self.overrides)
            if name is not None:
                return f"{head}override '{self.overrides[name]}': {text}"
        for key in keys:
            name = _nearest(key, self.lines)
            if name is not None and ("." in key or key == keys[0] or f"'{key}'" in text):
                return f"{self.file}:{self.lines[name]}: {text}"
        return line


def origin_of(file: Path, overrides: Sequence[str]) -> Origin:
    """Return where the keys of a YAML file that can be read, and of overrides, come from."""
    import yaml

    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    typed = {override.partition("=")[0].strip(): _shown(override) for override in overrides}
    return Origin(str(file), dict(_lines(root, "")), typed)


def _shown(override: str) -> str:
    """Return an override as it was typed, without a value that is long or holds a secret."""
    key, _, value = override.partition("=")
    is_short = len(value) <= _MOST_CHARACTERS and secret_part(value) is None
    return without_secrets(override) if is_short else f"{key}=..."


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if value is not node:
            yield from _lines(value, f"{name}.")


def _nearest(key: str, known: Mapping[str, Any]) -> str | None:
    """Return the key itself, or the longest one above it that is known."""
    while key:
        if key in known:
            return key
        key = key.rpartition(".")[0]
    return None
