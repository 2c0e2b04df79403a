"""What in a text is secret: access tokens, passwords, keys, what stands before the @ of a URL. Told, or taken out.

None of it may land in what a run leaves behind, which is passed around: configurations that hold one are refused
(`secret_part`), and whatever else is written goes through `without_secrets`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

REDACTED = "[redacted]"
_SURE = 20  # characters from which on what begins as a token is one, and no name

# `num_tokens` and `pad_tokens` are counts; only a singular `token` names a secret.
_NAME = (
    r"(?:token|secrets?|password|passwd|passphrase|pwd|api[_-]?key|access[_-]?key|private[_-]?key|secret[_-]?key"
    r"|credentials?|authorization|(?<![A-Za-z])sig|signature|cookie)"
)
_KEY = re.compile(rf"{_NAME}$", re.IGNORECASE)
_QUERY_WORDS = frozenset(
    [
        "token",
        "sig",
        "signature",
        "key",
        "apikey",
        "accesskey",
        "password",
        "passwd",
        "pwd",
        "pass",
        "secret",
        "auth",
        "authorization",
        "credential",
        "credentials",
        "jwt",
        "sas",
        "bearer",
    ]
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{8,}|sk[-_][A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{8,}"
    r"|gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-[A-Za-z0-9_.-]{8,}|xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{8,}"
    r"|xapp-[A-Za-z0-9-]{8,}|nvapi-[A-Za-z0-9_-]{8,}|AIza[A-Za-z0-9_-]{16,}|ya29\.[A-Za-z0-9_-]{8,}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|gsk_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{20,}|pypi-[A-Za-z0-9_-]{16,}"
    r"|r8_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32}|wandb_v\d_[A-Za-z0-9_]{8,}"
    r"|eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
    r"|(?i:bearer)\s+(?!\$)[^\s\"',;]{6,}"
    r"|(?i:basic)\s+(?=[a-z]*[A-Z0-9+/=])[A-Za-z0-9+/_-]{8,}={0,2}"
    r")"
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|.*)",
    re.DOTALL,
)
# The second way: a password may hold a slash; then the first colon is not that of a port.
_USERINFO = re.compile(
    r"(?:(?<=:/)/*|(?<![\w:/.])//)(?:[^/?#\s\"'<>]+|[^/?#\s@:\"'<>]+:(?!\d+[/?#])[^\s\"'<>]*)@(?=[^\s@])"
)
_BARE_USERINFO = re.compile(r"(?<![\w./:@+-])[\w.+-]+:[^\s/@:\"'{}]+@(?=[\w-]+(?:\.[\w-]+|:\d))")
_QUERY = re.compile(r"([?&;#])([^=&;#?\s\"'<>]+)=([^&;#\s\"'<>]+)")
_URL = re.compile(r"\w:/\S*")
_NO_SECRET = r"(?!(?:null|none|true|false)\b|[\"']?\$\{?[\w.:]+\}?[\"']?(?:[\s,;)]|$))"
_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|(?P<mark>\\+)"(?:(?!(?<!\\)(?P=mark)").)*(?<!\\)(?P=mark)"|\S+)"""
_ASSIGNMENT = re.compile(
    rf"(--[\w-]*{_NAME}\s+|{_NAME}[\"'\\]*\s*[:=]\s*){_NO_SECRET}{_VALUE}", re.IGNORECASE | re.DOTALL
)
# A key of YAML with all lines of its value: block scalars, quoted and plain ones that go on below.
_YAML = re.compile(
    rf"^(?P<indent>[ \t]*)(?P<key>(?:- +)?[\"']?[\w.-]*{_NAME}[\"']?[ \t]*:[ \t]+){_NO_SECRET}"
    r"[^\n]+(?:\n(?:(?P=indent)[ \t]+[^\n]*|[ \t]*(?=\n)))*",
    re.IGNORECASE | re.MULTILINE,
)


def without_secrets(text: str) -> str:
    """Return a text with `[redacted]` in place of what is secret in it.

    >>> without_secrets("https://me:pw@host/x?token=abc&page=2")
    'https://[redacted]@host/x?token=[redacted]&page=2'
    >>> without_secrets("HF_TOKEN=abc run --api-key 'x y' num_tokens=5")
    'HF_TOKEN=[redacted] run --api-key [redacted] num_tokens=5'
    """
    text = _USERINFO.sub(lambda found: f"{'/' * _slashes(found[0])}{REDACTED}@", text)
    text = _BARE_USERINFO.sub(f"{REDACTED}@", text)
    text = _QUERY.sub(
        lambda found: f"{found[1]}{found[2]}={REDACTED}" if _is_secret_query(found[2]) else found[0], text
    )
    text = _TOKEN.sub(REDACTED, text)
    text = _YAML.sub(rf"\g<indent>\g<key>{REDACTED}", text)
    return _ASSIGNMENT.sub(rf"\1{REDACTED}", text)


def secret_part(text: str, *, is_prose: bool = False) -> str | None:
    """Return what is secret in the value of a key, in words, or None.

    is_prose: the value is a text in which a URL may stand, not a path or URL itself.
    """
    places = _URL.findall(text) if is_prose else [text]
    if any(map(_USERINFO.search, places)) or (not is_prose and _BARE_USERINFO.search(text)):
        return "a user, password or token before the @"
    for place in places:
        for _, name, _ in _QUERY.findall(place):
            if _is_secret_query(name):
                return f"the query key '{name}'"
    token = next((found for found in _TOKEN.finditer(text) if len(found[0]) >= _SURE), None)
    return None if token is None else "what looks like an access token or private key"


def names_secret(key: str) -> bool:
    """Tell whether what stands under a key of this name is secret.

    >>> names_secret("hub_token"), names_secret("num_tokens"), names_secret("apiKey")
    (True, False, True)
    """
    return _KEY.search(key) is not None


def _slashes(text: str) -> int:
    return len(text) - len(text.lstrip("/"))


def _is_secret_query(name: str) -> bool:
    plain = unquote(name).replace("%", "")
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", plain)
    lowered = plain.lower()
    return lowered.startswith(("x-amz-", "x-goog-", "x-ms-")) or any(
        word in _QUERY_WORDS for word in (lowered, *re.split(r"[\W_]+", lowered), *map(str.lower, words))
    )
