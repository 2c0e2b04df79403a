"""A placement's adapters put on a host's model, in the layout in which the host has it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist.backends.hosts import bare, is_a
from plop_dist.errors import LayoutError, ModelError, PlacementError
from plop_dist.plugin.detect import find
from plop_dist.plugin.heads import task_of, warn_of_frozen_heads
from plop_dist.registry import HOST_LAYOUTS, load, names
from plop_dist.training.adapters.placed import check_complete
from plop_dist.training.adapters.shards import lora_layers
from plop_dist.values.names import unwrapped as unwrapped_path
from plop_dist.values.placement import Placement


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
    if found.wrapper not in names(HOST_LAYOUTS):
        raise LayoutError(
            f"placement.apply() cannot put adapters on a model of {found.backend} under '{found.wrapper}'; apply it "
            "before the model is wrapped."
        )
    layout, peft_config = load(HOST_LAYOUTS, found.wrapper), placement.to_peft(**options)
    if layout.is_whole:
        _check_model(inner, placement)
        peft_config.task_type = task_of(inner, peft_config.task_type)
    adapted = layout.adapt(_in_fabric(model), placement, peft_config)
    if layout.is_whole and peft_config.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        warn_of_frozen_heads(inner, unwrapped(adapted))
    if layout.is_whole and all(module.storage in ("linear", "conv1d") for module in placement.chosen):
        check_complete([path for path, _ in lora_layers(unwrapped(adapted))], placement)
    if is_a(model, "_FabricModule"):
        # The shell is what the host's loop calls; the optimizer is set up anew, as everywhere.
        model._forward_module, model._original_module = adapted, unwrapped(adapted)
        return model
    return adapted


def unwrapped(model: Any) -> Any:
    """Return the module inside DDP, torch.compile, a DeepSpeed engine and Megatron's wrappers; of chunks the first."""
    if isinstance(model, list | tuple | nn.ModuleList):
        model = model[0]
    inner, _ = bare(_in_fabric(model))
    while is_a(inner, "DeepSpeedEngine") or is_a(inner, "Float16Module"):
        inner = inner.module
    return inner


def _in_fabric(model: Any) -> Any:
    """Return what Lightning Fabric's strategy has made, out of the shell that fabric.setup returned."""
    while is_a(model, "_FabricModule"):
        model = model._forward_module
    return model


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
