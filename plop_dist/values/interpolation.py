"""How OmegaConf reads `${` in a text: another key's value, a resolver's call (`${oc.env:X}`), or, escaped, itself."""

from __future__ import annotations

import re

# Stands for the `$` of a call that is not to be followed; private characters, which no configuration holds.
MARK = "\ue000\uf8ff"


def literal(text: str) -> str:
    """Return a text as OmegaConf must be given it to read it as it is.

    >>> literal("a${b}")
    'a\\\\${b}'
    """
    # Backslashes before `${` count.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def mark_calls(text: str) -> str:
    """Return a text whose interpolations are marked instead of followed, if one of them calls a resolver.

    >>> mark_calls("${data.path}:x"), mark_calls("${oc.env:X}").replace(MARK, "$")
    ('${data.path}:x', '${oc.env:X}')
    """
    if not _calls(text):
        return text
    return re.sub(r"(\\*)\$\{", lambda found: found[0] if len(found[1]) % 2 else f"{found[1]}{MARK}{{", text)


def unmarked(text: str) -> str:
    """Return a text, marks and all that was followed in it, as OmegaConf must be given it to read the same again."""
    return literal(text).replace(MARK, "$")


def _calls(text: str) -> bool:
    depth = 0
    for piece in re.findall(r"\\+\$\{|\$?\{|\}|:", text):
        if piece.endswith("{"):
            escaped = (len(piece) - 2) % 2 if piece.startswith("\\") else 0
            depth += 1 if depth or (piece != "{" and not escaped) else 0
        elif piece == "}":
            depth = max(depth - 1, 0)
        elif depth:
            return True
    return False
