"""Secrets never reach the report: access tokens, passwords and keys are replaced before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

# `num_tokens` and `pad_tokens` are counts; only a singular `token` names a secret.
_SECRET_NAME = (
    r"(?:token|secrets?|password|passwd|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|authorization)"
)
_SECRET_KEY = re.compile(rf"(?:^|[_.\-]){_SECRET_NAME}$|^{_SECRET_NAME}$", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"""((?:\b|_){_SECRET_NAME}["']?\s*[:=]\s*|--[\w-]*{_SECRET_NAME}\s+)(?!null\b)[^\s,}}]+""", re.IGNORECASE
)
_VALUES = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"(?i)\bBearer\s+[^\s\"']+"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)


def redact(tree: Any) -> Any:
    """Return the same tree of dictionaries, lists and strings with every secret replaced by `[redacted]`.

    Secret are the values under keys that name one (token, secret, password, api_key, ...), such assignments inside
    text, and text that looks like an access token (hf_, sk-, gh*_, AKIA, Bearer, user:password@host).
    """
    if isinstance(tree, Mapping):
        return {key: REDACTED if _names_secret(key, value) else redact(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    return _redact_text(tree) if isinstance(tree, str) else tree


def _names_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and _SECRET_KEY.search(key) is not None


def _redact_text(text: str) -> str:
    for pattern in _VALUES:
        text = pattern.sub(REDACTED, text)
    return _ASSIGNMENT.sub(rf"\1{REDACTED}", text)
