"""The shortest names that occur in exactly the wanted paths, where a name matches whatever contains it.

So matches DeepSpeed: `up_proj` also hits `gate_up_proj`, and `3.mlp` hits `13.mlp`. It searches in the prefix under
which a module's weights are stored: its path and a dot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from plop_dist.values.names import natural_key


class Name(NamedTuple):
    """Consecutive components of a path, with a dot before the first, and one after the last, or not."""

    parts: tuple[str, ...]
    dot_before: bool
    dot_after: bool

    @property
    def text(self) -> str:
        """What is searched for."""
        return "." * self.dot_before + ".".join(self.parts) + "." * self.dot_after


def shortest_substrings(wanted: Iterable[str], others: Collection[str]) -> tuple[list[str], str | None]:
    """Return names of which each wanted path contains one and no other path contains any, in natural order.

    Then comes None, or a wanted path that has no such name: another contains all of it.
    """
    paths = sorted(set(wanted), key=natural_key)
    occurrences = _Occurrences(others, {path.rpartition(".")[2] for path in paths})
    names = _Names()
    for path in paths:
        parts = tuple(path.split("."))
        if names.has_one_in(parts):
            continue
        name = next((name for name in _forms(parts) if not occurrences.has(name)), None)
        if name is None:
            return names.texts, path
        names.add(name)
    return names.texts, None


def _forms(parts: tuple[str, ...]) -> Iterable[Name]:
    for start in reversed(range(len(parts))):
        yield Name(parts[start:], False, False)
        if start:
            yield Name(parts[start:], True, False)
            yield Name(parts[start:], True, True)
    yield Name(parts, False, True)


class _Occurrences:
    """Whether a name occurs in any of some paths, found without a search through each of them.

    A name of several components occurs where all but its first and last are whole components, its first ends one and
    its last begins one: so it is looked up among the runs of components that end in what begins with such a last one.
    """

    def __init__(self, paths: Collection[str], lasts: Collection[str]) -> None:
        self._split = [path.split(".") for path in paths]
        self._inner = {part for parts in self._split for part in parts[1:]}
        self._values = self._inner | {parts[0] for parts in self._split}
        self._ending: dict[str, list[str]] = {}
        self._beginning: dict[str, list[str]] = {last: [] for last in lasts}
        for value in self._values:
            for start in range(len(value) + 1):
                self._ending.setdefault(value[start:], []).append(value)
            for last in {value[:end] for end in range(len(value) + 1)} & self._beginning.keys():
                self._beginning[last].append(value)
        ends = {value for values in self._beginning.values() for value in values}
        self._runs, self._inner_runs = set(), set()
        for parts in self._split:
            for end in (index for index, part in enumerate(parts) if part in ends):
                runs = [".".join(parts[start : end + 1]) for start in range(end)]
                self._runs.update(runs)
                self._inner_runs.update(runs[1:])
        self._single: dict[Name, bool] = {}

    def has(self, name: Name) -> bool:
        if len(name.parts) == 1:
            if name not in self._single:
                self._single[name] = self._has_single(*name)
            return self._single[name]
        first, *middle, last = name.parts
        firsts = [first] if name.dot_before else self._ending.get(first, [])
        lasts = [last] if name.dot_after else self._beginning[last]
        runs = self._inner_runs if name.dot_before else self._runs
        return any(".".join((start, *middle, end)) in runs for start in firsts for end in lasts)

    def _has_single(self, parts: tuple[str, ...], dot_before: bool, dot_after: bool) -> bool:
        (part,) = parts
        if not dot_before:
            return any(value.endswith(part) if dot_after else part in value for value in self._values)
        return part in self._inner if dot_after else any(value.startswith(part) for value in self._inner)


class _Names:
    """The names found so far, and whether one of them occurs in a path."""

    def __init__(self) -> None:
        self._names: dict[Name, None] = {}
        self._single: list[str] = []
        self._firsts: set[str] = set()
        self._lasts: set[str] = set()

    @property
    def texts(self) -> list[str]:
        return [name.text for name in self._names]

    def add(self, name: Name) -> None:
        self._names[name] = None
        if len(name.parts) == 1:
            self._single.append(name.text)
        else:
            self._firsts.add(name.parts[0])
            self._lasts.add(name.parts[-1])

    def has_one_in(self, parts: tuple[str, ...]) -> bool:
        text = f"{'.'.join(parts)}."
        return any(name in text for name in self._single) or any(name in self._names for name in self._runs(parts))

    def _runs(self, parts: tuple[str, ...]) -> Iterable[Name]:
        """Yield every name of several components that occurs in this path and could be one of these names."""
        for end, part in enumerate(parts):
            for last in {part[:length] for length in range(len(part) + 1)} & self._lasts:
                for start in range(end):
                    for first in {parts[start][cut:] for cut in range(len(parts[start]) + 1)} & self._firsts:
                        run = (first, *parts[start + 1 : end], last)
                        dots_before = (False, True) if start and first == parts[start] else (False,)
                        for dot_before in dots_before:
                            yield Name(run, dot_before, False)
                            if last == part:
                                yield Name(run, dot_before, True)
