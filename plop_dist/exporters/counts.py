"""Notes on a number of trainable parameters that is not the placement's: widened, or in a fused linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from plop_dist.exporters.holders import Targets
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection


def count_note(placement: Placement, targets: Targets) -> tuple[str, ...]:
    """Return a note when widening changes the number of trainable parameters."""
    return _note(targets.num_trainable_parameters, placement) if targets.widened else ()


def fused_count_note(
    placement: Placement, items: Iterable[Projection], fused: Callable[[Projection], str | None], rank: int
) -> tuple[str, ...]:
    """Return a note when adapters on `items` at `rank` have another number of parameters than the placement.

    fused: the linear beside this projection that holds it in the target framework and gets one adapter for all its
    rows, or None where the target holds it as the Hugging Face model does.
    """

    def in_target(item: Projection) -> Projection:
        name = fused(item)
        if name is None:
            return item
        return item.model_copy(update={"storage": "fused", "stored_in": f"{item.fqn.rpartition('.')[0]}.{name}"})

    count = num_trainable_parameters(map(in_target, items), lambda _: rank)
    return () if count == placement.num_trainable_parameters else _note(count, placement)


def _note(count: int, placement: Placement) -> tuple[str, ...]:
    return (f"{count:,} trainable parameters instead of the placement's {placement.num_trainable_parameters:,}.",)
