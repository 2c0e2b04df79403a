"""Whether a Megatron layout divides a model, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plop_dist.backends.hf.layout import num_experts
from plop_dist.config.schema import ParallelConfig
from plop_dist.errors import LayoutError
from plop_dist.values.mesh import divisors, nearest


def check_layout(hf_config: Any, parallel: ParallelConfig) -> None:
    """Raise LayoutError where the layout does not divide the model, naming the nearest sizes that do."""
    text = hf_config.get_text_config()
    experts = num_experts(hf_config)
    heads = getattr(text, "num_attention_heads", None)
    fields = [
        ("tp", "num_attention_heads", heads),
        ("tp", "num_key_value_heads", getattr(text, "num_key_value_heads", None)),
        ("tp", "intermediate_size", getattr(text, "intermediate_size", None)),
        ("tp", "hidden_size", getattr(text, "hidden_size", None) if parallel.sequence_parallel else None),
        ("pp", "num_hidden_layers", getattr(text, "num_hidden_layers", None)),
        ("ep", "number of experts", experts),
    ]
    # Gemma-3n gives one size per layer.
    pairs = [
        (axis, field, size)
        for axis, field, sizes in fields
        for size in (sorted(set(sizes)) if isinstance(sizes, list) else [sizes])
    ]
    for axis, field, total in pairs:
        size = getattr(parallel, axis)
        if total and total % size:
            fitting = " or ".join(map(str, nearest(size, _common_divisors(axis, pairs))))
            raise LayoutError(
                f"parallel.{axis} ({size}) does not divide the model's {field} ({total}); "
                f"use parallel.{axis}={fitting}."
            )
    if parallel.ep > 1 and not experts:
        raise LayoutError(f"parallel.ep is {parallel.ep}, but the model has no experts; set parallel.ep=1.")


def _common_divisors(axis: str, pairs: Sequence[tuple[str, str, int | None]]) -> list[int]:
    totals = [total for name, _, total in pairs if name == axis and total]
    return divisors(math.gcd(*totals))
