"""Which adapters have a higher rank than any update of their module's weight can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from plop_dist.values.names import expert_index, module_type, natural_key
from plop_dist.values.scores import Projection

_SHARED = ("fused", "expert_parameter")


@dataclass(frozen=True)
class Oversized:
    """The adapters of one type: their rank, and the highest rank that B A can have there, min(in, out) features."""

    type: str
    rank: int
    most: int
    in_features: int
    out_features: int


def oversized_ranks(modules: Iterable[Projection], rank_of: Callable[[Projection], int]) -> list[Oversized]:
    """Return the types whose adapters' rank exceeds min(in_features, out_features), in natural order.

    Chosen parts of one fused linear count together, since one adapter holds all their rows. Beyond that limit B A
    cannot express more: the further rows of A and columns of B are trained, stored and sent for nothing.
    """
    by_adapter: dict[tuple[str, int | None], dict[str, Projection]] = {}
    for module in modules:
        path = module.holder if module.storage in _SHARED else module.fqn
        by_adapter.setdefault((path, expert_index(module.fqn)), {})[module.type] = module
    found: dict[str, Oversized] = {}
    for parts in by_adapter.values():
        out_features = sum(part.out_features for part in parts.values())
        for name, part in parts.items():
            rank, most = rank_of(part), min(part.in_features, out_features)
            if rank > most and (name not in found or most < found[name].most):
                found[name] = Oversized(name, rank, most, part.in_features, out_features)
    return sorted(found.values(), key=lambda item: natural_key(item.type))


def refused_ranks(oversized: list[Oversized], rank: int, rank_pattern: Mapping[str, int]) -> str:
    """Return the message for ranks that are too high: what they are, what they can be, and the keys to set.

    rank, rank_pattern: those asked for; other entries of the pattern stand in what is offered, too.
    """
    worst = min(oversized, key=lambda item: item.most)
    others = ", ".join(f"{item.type} ({item.most})" for item in oversized if item is not worst)
    most = {item.type: item.most for item in oversized}
    kept = {name: value for name, value in rank_pattern.items() if value <= most.get(module_type(name), value)}
    pattern = ", ".join(f"{name}: {value}" for name, value in {**kept, **most}.items())
    remedy = f"placement.rank_pattern={{{pattern}}}"
    if all(item.rank == rank for item in oversized):
        remedy = f"placement.rank={worst.most} or less, or {remedy}"
    key = "placement.rank" if worst.rank == rank else "placement.rank_pattern"
    return (
        f"{key} is {worst.rank} for {worst.type}, whose weight of {worst.out_features} x {worst.in_features} takes an "
        f"update of rank {worst.most} at most{f'; so do {others}' if others else ''}; set {remedy}."
    )
