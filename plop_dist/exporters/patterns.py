"""The shortest `*.name` patterns that match exactly the wanted paths, where a dot stands for any character.

So matches NeMo Automodel: against a module's whole path, with `*` for any text, the rest of a pattern being a regex.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from plop_dist.exporters.suffixes import shortest_names, suffixes

_ANY = re.compile(r"[.*]")  # what a pattern writes as a dot: `*` itself would be any text
_SPECIAL = re.compile(r"[\\^$+?{}\[\]|()]")


def shortest_patterns(wanted: Collection[str], known: Iterable[str]) -> list[str]:
    """Return patterns that match all wanted paths and no other known one, in natural order of what they match.

    >>> shortest_patterns(["a.0.mlp.up", "a.1.mlp.up"], ["a.0.mlp.up", "a.1.mlp.up", "a.0.mlp.gate_up"])
    ['*.mlp.up']
    """
    paths, known = dict.fromkeys(wanted), tuple(known)
    others = _Tails(path for path in known if path not in paths)
    names = shortest_names(paths, known)
    covered: dict[str, list[str]] = {name: [] for name in names}
    for path in paths:
        for suffix in suffixes(path):
            if suffix in covered:
                covered[suffix].append(path)
    patterns = []
    for name in names:
        if name in paths:
            patterns.append(_written(name))
        longer = [path for path in covered[name] if path != name]
        if longer:
            patterns += _patterns_of(name, longer, others)
    return patterns


def _patterns_of(name: str, paths: list[str], others: _Tails) -> list[str]:
    parts = paths[0].split(".")
    for length in range(name.count(".") + 1, len(parts)):
        tail = f".{'.'.join(parts[-length:])}"
        # `*.up_proj` also hits gate_up_proj, since the dot stands for any character: name the parent too.
        if tail not in others and all(_is_tail(tail, path) for path in paths):
            return [f"*{_written(tail)}"]
    return [_written(path) for path in paths]


def _is_tail(tail: str, path: str) -> bool:
    places = _places(tail)
    return len(path) >= len(tail) and blanked(path[-len(tail) :], places) == blanked(tail, places)


def _places(tail: str) -> tuple[int, ...]:
    return tuple(found.start() for found in _ANY.finditer(tail))


def blanked(text: str, places: Iterable[int]) -> str:
    """Return a text with a dot at these places, where a pattern takes any character."""
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def _written(text: str) -> str:
    return _ANY.sub(".", _SPECIAL.sub(r"\\\g<0>", text))


class _Tails:
    """The ends of paths, as patterns see them: for each length and places of dots one set, made when first asked."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._sets: dict[tuple[int, tuple[int, ...]], frozenset[str]] = {}

    def __contains__(self, tail: str) -> bool:
        length, places = len(tail), _places(tail)
        if (length, places) not in self._sets:
            ends = (path[-length:] for path in self._paths if len(path) >= length)
            self._sets[length, places] = frozenset(blanked(end, places) for end in ends)
        return blanked(tail, places) in self._sets[length, places]
