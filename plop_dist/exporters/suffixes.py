"""The shortest names that match exactly the wanted paths, where a name matches a path's end.

A name matches a path that is equal to it or ends with a dot and the name: so match all frameworks built on PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TypeVar

from plop_dist.values.names import layer_index, natural_key

_Group = TypeVar("_Group", bound=Hashable)
_SHARED = object()


def suffixes(path: str) -> list[str]:
    """Return every name that matches a path, the longest first.

    >>> suffixes("mlp.0.up")
    ['mlp.0.up', '0.up', 'up']
    """
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """Return the predicate that PEFT applies to a list of names."""
    wanted = set(names)
    return lambda path: any(suffix in wanted for suffix in suffixes(path))


def shortest_names(wanted: Iterable[str], known: Iterable[str], min_parts: int = 1) -> tuple[str, ...]:
    """Return the names that match all wanted paths and no other known one.

    The shortest suffix that does; one that would reach up to a layer's number becomes the full path.

    >>> shortest_names(["m.0.mlp.up", "m.1.mlp.up"], ["m.0.mlp.up", "m.1.mlp.up", "m.0.shared.up"])
    ('mlp.up',)
    """
    paths = set(wanted)
    return shortest_names_of({True: paths, False: set(known) - paths}, [True], min_parts)[True]


def shortest_names_of(
    groups: Mapping[_Group, Collection[str]], asked: Iterable[_Group], min_parts: int = 1
) -> dict[_Group, tuple[str, ...]]:
    """Return for each group that is asked for the names that match all its paths and none of the other groups."""
    group_of: dict[str, object] = {}
    for group, paths in groups.items():
        for path in paths:
            for suffix in suffixes(path):
                if group_of.setdefault(suffix, group) != group:
                    group_of[suffix] = _SHARED
    return {
        group: tuple(
            dict.fromkeys(
                _shortest_name(path, lambda suffix, group=group: group_of[suffix] == group, min_parts)
                for path in sorted(set(groups[group]), key=natural_key)
            )
        )
        for group in asked
    }


def _shortest_name(path: str, is_free: Callable[[str], bool], min_parts: int) -> str:
    parts = path.split(".")
    in_layer = (
        next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1) if layer_index(path) is not None else -1
    )
    for length in range(min(min_parts, len(parts)), len(parts) - in_layer):
        suffix = ".".join(parts[-length:])
        # A bare number would match the layers themselves.
        if is_free(suffix) and not parts[-length].isdigit():
            return suffix
    return path
