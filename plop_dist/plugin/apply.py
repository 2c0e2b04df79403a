"""A placement's adapters put on a host's model, in the layout in which the host has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from plop_dist.backends.hosts import bare, is_a
from plop_dist.errors import LayoutError, ModelError, PlacementError
from plop_dist.plugin.detect import find
from plop_dist.training.adapters.on_hosts import adapt_ddp, adapt_engine, adapt_fsdp2, adapt_plain
from plop_dist.training.adapters.placed import check_complete
from plop_dist.training.adapters.shards import lora_layers
from plop_dist.values.names import unwrapped as unwrapped_path
from plop_dist.values.placement import Placement

Adapt = Callable[[Any, Any], Any]


def apply(placement: Placement, model: Any, **options: Any) -> Any:
    """Return what the host trains from here on: its model with the placement's adapters. Collective over the world.

    See Placement.apply. Raises LayoutError where the layout takes adapters only before it wraps the model, and where
    the ranks' placements differ; ModelError for a model that has adapters already; PlacementError where the model's
    modules are not those of the placement.
    """
    check_same(placement)
    found = find(model)
    inner = unwrapped(model)
    if hasattr(inner, "peft_config"):
        raise ModelError(
            f"placement.apply() got a {type(inner).__name__} that has adapters already; give it the base model, or "
            "merge the adapters first (PEFT's merge_and_unload)."
        )
    if found.wrapper not in _ADAPT:
        raise LayoutError(
            f"placement.apply() cannot put adapters on a model of {found.backend} under '{found.wrapper}'; "
            f"{_BEFORE.get(found.wrapper, 'apply it before the model is wrapped')}."
        )
    if is_a(model, "_FabricModule"):
        raise LayoutError("placement.apply() got what fabric.setup returned; apply it to the model before that.")
    _check_model(inner, placement)
    adapted = _ADAPT[found.wrapper](model, placement.to_peft(**options))
    if all(module.storage in ("linear", "conv1d") for module in placement.chosen):
        check_complete([path for path, _ in lora_layers(unwrapped(adapted))], placement)
    return adapted


def unwrapped(model: Any) -> Any:
    """Return the module inside DDP, torch.compile and a DeepSpeed engine; a list of chunks as it is."""
    inner, _ = bare(model)
    return inner.module if is_a(inner, "DeepSpeedEngine") else inner


def check_same(placement: Placement) -> None:
    """Raise LayoutError, on every rank, where the ranks' placements differ. Collective over the world."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    own = {
        "module_types": list(placement.module_types),
        "rank": placement.rank,
        "alpha": placement.alpha,
        "rank_pattern": placement.rank_pattern,
        "the hash of its modules": hashlib.sha256("\n".join(placement.modules).encode()).hexdigest()[:12],
    }
    every: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        key = next((key for key in own if other[key] != every[0][key]), None)
        if key is not None:
            raise LayoutError(
                f"the placements differ among ranks: {key} is {every[0][key]} on rank 0 and {other[key]} on rank "
                f"{rank}; place the same scores on every rank: score() gives all ranks of a process group equal ones."
            )


def _check_model(inner: Any, placement: Placement) -> None:
    """Raise PlacementError, before anything is touched, for a model without the placement's modules."""
    chosen = {module.holder for module in placement.chosen if module.storage != "expert_parameter"}
    if missing := sorted(chosen - {unwrapped_path(path) for path, _ in inner.named_modules()}):
        raise PlacementError(
            f"the model has no module '{missing[0]}', which the placement of {placement.source.model.name_or_path} "
            "chose; score and place this model."
        )


_ADAPT: dict[str, Adapt] = {
    "plain": adapt_plain,
    "ddp": adapt_ddp,
    "fsdp2": adapt_fsdp2,
    "zero_init": adapt_plain,
    "zero": adapt_engine,
}

_BEFORE = {
    "autotp": "give the placement to the model before AutoTP cuts it, or train with plop-dist run, whose AutoTP "
    "engine has adapters of its own",
    "pipeline": "build the PipelineModule from layers of get_peft_model(model, placement.to_peft()), or train with "
    "plop-dist run",
    "tp_plan": "train with plop-dist run, whose engine sums the gradients of adapters over tensor-parallel ranks",
    "megatron": "give placement.to_megatron() to Megatron-Bridge before DDP wraps its chunks, e.g. as cfg.peft",
}
