"""What can go wrong with a tree, with the text that holds it, and with bytes; all drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 0.5, -0.0, 1e-300, 5e-324, 1e9, 1e308, math.inf, -math.inf, math.nan, 2**31, 2**53 + 1, 2**63,
    -(2**63), 10**30, 10**400,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "0", "-1", "1e400", "nan", "true", "null", "\x00", "\x1b[2J", "a\nb", "\r", "\t", "\ud800",
    "\udfff\ud800", "²", "é", "𝕏", "\u202e", "\u2028", "*", "**", "(", "[", "\\", ".", "..", "a..b", ".a", "a.",
    "../../x", "/", "~", "%s", "{}", "{question", "${a}", "${oc.env:HOME}", "${model}", "???", "<script>", "[red]",
    "[/]", "@", ":", "builtin:", "builtin:x", "x" * 300, "x" * 100_000, "9" * 5000, "q_proj", "v_proj", "lm_head",
    "model.layers.0", "all-linear", ".*", "(?i)a", "layers.1", "experts.0.x",
)  # fmt: skip
_MAX_DEPTH = 60


def odd_value(rng: Random) -> Any:
    """Return a value that hardly any field expects."""
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((None, True, False)),
            lambda: rng.choice(([], {}, [[]], [None], [{}], {"": ""}, {"a": 1}, {"r": None}, ["a", "a"], [0] * 3)),
            lambda: [odd_value(rng) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(TEXTS): odd_value(rng) for _ in range(rng.randrange(4))},
            lambda: nested(rng),
        )
    )()


def nested(rng: Random) -> Any:
    """Return lists or mappings inside each other, up to _MAX_DEPTH deep."""
    value: Any = None
    for _ in range(rng.randrange(2, _MAX_DEPTH)):
        value = {"a": value} if rng.random() < 0.5 else [value]
    return value


def mutated(tree: Any, rng: Random) -> Any:
    """Return a copy of a tree of dictionaries, lists and scalars with one to four things wrong."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        parent, key = rng.choice(places)
        rng.choice(_EDITS)(parent, key, rng, places)
    return tree if rng.random() < 0.98 else odd_value(rng)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def _replace(parent: Any, key: Any, rng: Random, places: Any) -> None:
    parent[key] = odd_value(rng)


def _delete(parent: Any, key: Any, rng: Random, places: Any) -> None:
    del parent[key]


def _twist(parent: Any, key: Any, rng: Random, places: Any) -> None:
    """Change a value into one of the same type, or the same value of another type."""
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = rng.choice((not value, str(value), int(bool(value))))
    elif isinstance(value, int | float):
        real = float(value) if abs(value) < 1e300 else -value  # JSON's whole numbers may have any size
        choices = (-value, value + 1, value - 1, value * 2, str(value), [value], real, rng.choice(NUMBERS))
        parent[key] = rng.choice(choices)
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        choices = (value[:at], value[:at] + rng.choice(TEXTS) + value[at:], value * 2, value.upper(), [value])
        parent[key] = rng.choice(choices)
    elif isinstance(value, list):
        choices = (value[:-1], value * 2, value[::-1], value[:1], [], dict(enumerate(map(str, value))), [value])
        parent[key] = rng.choice(choices)
    else:
        choices = ({}, list(value), list(value.values()), {**value, rng.choice(TEXTS): odd_value(rng)}, [value])
        parent[key] = rng.choice(choices)


def _add(parent: Any, key: Any, rng: Random, places: Any) -> None:
    if isinstance(parent, dict):
        parent[rng.choice((*TEXTS, "unknown"))] = odd_value(rng)
    else:
        parent.insert(key, rng.choice((odd_value(rng), copy.deepcopy(parent[key]))))


def _borrow(parent: Any, key: Any, rng: Random, places: Any) -> None:
    """Put what lies elsewhere in the tree here."""
    source, name = rng.choice(places)
    parent[key] = copy.deepcopy(source[name])


_EDITS: tuple[Callable[..., None], ...] = (_replace, _replace, _replace, _twist, _twist, _delete, _add, _borrow)


def json_text(tree: Any) -> bytes:
    """Return a tree as the JSON that Python's own reader takes: NaN, Infinity and lone surrogates included."""
    try:
        return json.dumps(tree, indent=1).encode()
    except ValueError:  # an integer of more than 4,300 digits
        return json.dumps(str(type(tree))).encode()


def mutated_text(content: bytes, rng: Random) -> bytes:
    """Return the bytes of a text file with something wrong beneath the level of its tree."""
    return rng.choice(_TEXT_EDITS)(content, rng)


def _truncated(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _inserted(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    odd = (
        b"\xff",
        b"\x00",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\\ud800",
        b"\t",
        b",",
        b"[",
        b"}",
        b'"',
        b"\xef\xbb\xbf",
        b"- ",
    )
    return content[:at] + rng.choice(odd) + content[at:]


def _encoded(content: bytes, rng: Random) -> bytes:
    text = content.decode("utf-8", errors="replace") + "é"
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-16-le")), errors="replace")


def _lines_moved(content: bytes, rng: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    return b"".join([*lines[:to], lines[at], *lines[to:]])  # a key or an entry is there twice


def _replaced(content: bytes, rng: Random) -> bytes:
    deep = rng.choice((b"[", b'{"a":', b"- ", b"a: {")) * rng.choice((500, 5_000, 200_000))
    number = b'{"schema": ' + b"9" * 10_000 + b"}"
    return rng.choice((b"", b"\n", b"null", b"[]", b"{}", b'"text"', b"text", b"0", b"NaN", b"\x00" * 64, deep, number))


_TEXT_EDITS = (_truncated, _flipped, _inserted, _encoded, _lines_moved, _replaced)
