"""Which rank PEFT's rank_pattern gives a path, without trying every key on every path.

PEFT takes the first key that matches: a regular expression against the path's end, with nothing or a dot before it.
Most keys are names, in which at most a dot stands for any character: those are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from plop_dist.exporters.patterns import blanked

_NAME = re.compile(r"\^?(?:\w|\\?[.-])+", re.ASCII)


def as_peft_matches(key: str) -> str:
    """Return the expression that PEFT matches for a key (peft.utils.other.get_pattern_key)."""
    return rf"(.*\.)?({key})$"


class RankPattern:
    """A rank_pattern, ready to be asked for many paths. Raises re.error for a key that is no regular expression.

    regexes: its keys that are more than a name.
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._exact = dict(ranks)
        self._ranks = tuple(ranks.values())
        self.regexes = tuple(key for key in ranks if not _NAME.fullmatch(key))
        self._compiled = [
            (number, re.compile(as_peft_matches(key))) for number, key in enumerate(ranks) if not _NAME.fullmatch(key)
        ]
        # Per form (anchored, length, places of dots that stand for any character): name -> number of its first key.
        self._names: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
        for number, key in enumerate(ranks):
            if _NAME.fullmatch(key):
                text = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
                unescaped = re.sub(r"\\.", "_", key.removeprefix("^"))
                places = tuple(found.start() for found in re.finditer(r"\.", unescaped))
                form = (key.startswith("^"), len(text), places)
                self._names.setdefault(form, {}).setdefault(blanked(text, places), number)

    def rank_of(self, path: str, default: int) -> int:
        """Return the rank of the first key that matches, else of the key that is the path letter for letter, else the
        default.
        """
        found = [number for form, names in self._names.items() if (number := _number(path, form, names)) is not None]
        first = min(found, default=len(self._ranks))
        for number, regex in self._compiled:
            if number > first:
                break
            if regex.match(path):
                first = number
                break
        return self._ranks[first] if first < len(self._ranks) else self._exact.get(path, default)


def _number(path: str, form: tuple[bool, int, tuple[int, ...]], names: Mapping[str, int]) -> int | None:
    is_anchored, length, places = form
    before = len(path) - length
    if before < 0 or (before and (is_anchored or path[before - 1] != ".")):
        return None
    return names.get(blanked(path[before:], places))
