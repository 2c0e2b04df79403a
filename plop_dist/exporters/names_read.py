"""What names adapt in the scored model where a target has a way of its own to match one with a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plop_dist.exporters.exporter import Adapted
from plop_dist.exporters.holders import known_projections
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection


def found_by(
    placement: Placement, rank: int, names: Sequence[str], matches: Callable[[str, Projection], bool]
) -> Adapted:
    """Return every projection that some name matches, all at one rank, and the names that match none."""
    ranks: dict[str, int] = {}
    used: set[str] = set()
    for item in known_projections(placement):
        hits = [name for name in names if matches(name, item)]
        if hits:
            ranks[item.fqn] = rank
            used.update(hits)
    return Adapted(ranks=ranks, rank=rank, unmatched=tuple(name for name in names if name not in used))


def in_fused(item: Projection, name: str) -> Projection:
    """Return the projection as a part of a linear beside it, which gets one adapter for all its rows."""
    return item.model_copy(update={"storage": "fused", "stored_in": f"{item.fqn.rpartition('.')[0]}.{name}"})
