"""What the placement asks of the adapters: PEFT's configuration, ranks, scaling, and that none is missing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement


def lora_config(placement: Placement, config: Config, *, widen: bool = False) -> Any:
    """Return the peft.LoraConfig that stands for the placement in training. Raises ExportError."""
    return placement.to_peft(lora_dropout=config.train.lora_dropout, widen=widen)


def scaling_of(placement: Placement) -> float:
    """Return alpha / rank, which every module keeps whatever its own rank is."""
    return placement.alpha / placement.rank


def ranks_of(placement: Placement) -> dict[str, int]:
    """Return the LoRA rank of every chosen module by path."""
    return {module.fqn: placement.rank_of(module) for module in placement.chosen}


def check_complete(adapted: Collection[str], placement: Placement) -> None:
    """Raise PlacementError unless exactly the chosen modules have an adapter."""
    missing = sorted(set(placement.modules) - set(adapted), key=natural_key)
    foreign = sorted(set(adapted) - set(placement.modules), key=natural_key)
    if missing or foreign:
        what = f"'{missing[0]}' got no adapter" if missing else f"'{foreign[0]}' got one without being chosen"
        raise PlacementError(
            f"The placement has {len(placement.modules)} modules, but {len(adapted)} got an adapter: {what}; "
            "score and place this model again."
        )
