"""How many trainable parameters LoRA adapters on given projections have, counted as PEFT counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from plop_dist.values.names import expert_index
from plop_dist.values.scores import Projection

# Parts that together make up a whole fused linear (or fused expert parameter).
_WHOLE_SETS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))


def num_trainable_parameters(
    modules: Iterable[Projection], rank_of: Callable[[Projection], int], left_out: Iterable[Projection] = ()
) -> int:
    """Return the number of elements of all A (r x in_features) and B (out_features x r).

    A fused linear or 3-D expert parameter all of whose parts are given carries one adapter, as under PEFT: one A for
    all its rows, at the highest rank of its parts; experts in a 3-D parameter have r rows of A and columns of B each.
    Taken in part, each projection counts by itself, as Megatron-Bridge's CanonicalLoRA adapts it.

    left_out: projections without a score (Scores.left_out): where they share a holder with given ones they are
    adapted with it, so they count; others do not.
    """
    by_holder: dict[str, list[Projection]] = {}
    for module in modules:
        by_holder.setdefault(module.holder, []).append(module)
    for module in left_out:
        if module.holder in by_holder and module.storage in ("fused", "expert_parameter"):
            by_holder[module.holder].append(module)
    return sum(_count_holder(parts, rank_of) for parts in by_holder.values())


def is_whole(parts: Iterable[Projection]) -> bool:
    """Tell whether projections of one holder make up all of it, whatever the number of experts."""
    found = {part.type.removeprefix("experts.") for part in parts}
    touched = [whole for whole in _WHOLE_SETS if found & whole]
    return all(whole <= found for whole in touched)


def _count_holder(parts: list[Projection], rank_of: Callable[[Projection], int]) -> int:
    storage = parts[0].storage
    if storage not in ("fused", "expert_parameter") or not is_whole(parts):
        return sum(rank_of(part) * (part.in_features + part.out_features) for part in parts)
    rank = max(rank_of(part) for part in parts)
    num_experts = len({expert_index(part.fqn) for part in parts})
    rows = {part.type: part.out_features for part in parts}
    return rank * num_experts * (parts[0].in_features + sum(rows.values()))
