"""How a refusal names the choice without some types: the key that leaves them out, whole, as it must be given."""

from __future__ import annotations

from collections.abc import Iterable

from plop_dist.values.placement import Placement


def excluding(placement: Placement, types: Iterable[str]) -> str:
    """Return `placement.exclude=[...]` with these types besides those that are out by configuration (lm_head)."""
    return f"placement.exclude=[{','.join(excluded_with(placement, types))}]"


def excluded_with(placement: Placement, types: Iterable[str]) -> list[str]:
    """Return the list itself: a list that is given replaces the one that was there."""
    return list(dict.fromkeys([*placement.policy.get("exclude", ()), *types]))
