"""How many trainable parameters LoRA adapters on given projections have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from plop_dist.types import ModuleScore, Projection


def num_trainable_parameters(modules: Iterable[ModuleScore], rank_of: Callable[[Projection], int]) -> int:
    """Return the number of elements of A (r x in_features) and B (out_features x r) over all modules."""
    return sum(rank_of(module) * (module.in_features + module.out_features) for module in modules)
