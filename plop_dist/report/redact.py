"""Secrets never reach the report: access tokens, passwords and keys are replaced before anything is rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.values.secret_texts import REDACTED, names_secret, without_secrets


def redact(tree: Any) -> Any:
    """Return the same tree of dictionaries, lists and strings with every secret replaced by `[redacted]`.

    Secret are texts under keys that name one (token, secret, password, api_key, ...), and what
    values/secret_texts.py finds inside other texts.
    """
    if isinstance(tree, Mapping):
        return {key: REDACTED if _names_secret(key, value) else redact(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    return without_secrets(tree) if isinstance(tree, str) else tree


def _names_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and names_secret(key)
