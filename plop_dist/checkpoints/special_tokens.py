"""Whether a folder's special tokens are such that a tokenizer can be made of them in reasonable time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plop_dist.errors import ModelError

_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_MAX_LENGTH = 4096  # characters; what is longer takes tokenizers minutes, in which no signal reaches Python


def check_special_tokens(folder: Path) -> None:
    """Raise ModelError naming file and key of a special token that is too long to be one.

    Files that cannot be read are left to transformers, which says so itself.
    """
    for path in (folder / name for name in _FILES):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for key, token in _tokens(tree):
            if len(token) > _MAX_LENGTH:
                raise ModelError(
                    f"'{path}': {key} is a text of {len(token):,} characters, expected a token; the file is damaged: "
                    "copy or download it again."
                )


def _tokens(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield every special token with the key it is under: a text, an object with `content`, or a list of these."""
    if not isinstance(tree, Mapping):
        return
    pending = [(key, value) for key, value in tree.items() if "token" in key]
    while pending:
        key, value = pending.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, Mapping):
            pending += [(key, inner) for inner in value.values()]
        elif isinstance(value, list):
            pending += [(key, inner) for inner in value]
