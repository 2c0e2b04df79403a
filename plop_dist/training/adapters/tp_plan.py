"""PEFT's adapters on a model that transformers' own plan has sharded: put on, and what of them lies on this rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist.errors import PlacementError
from plop_dist.training.adapters.shards import FIRST_ADAPTER, AdapterShard, gather_lengths, lora_layers


def add_planned(model: nn.Module, peft_config: Any) -> Any:
    """Return the model wrapped by PEFT, its linears and adapters sized by what of them lies on this rank."""
    from peft import get_peft_model

    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "_hf_tp_plan"):
            # transformers 5.12.1 divides out_features once for the weight and once more for the bias.
            module.out_features, module.in_features = module.weight.shape
    wrapped: Any = model  # PEFT asks for transformers' class, of which load_model knows nothing
    adapted = get_peft_model(wrapped, peft_config)
    for _, layer in lora_layers(adapted):
        for part in (layer.lora_A[FIRST_ADAPTER], layer.lora_B[FIRST_ADAPTER]):
            # PEFT 0.21.2 leaves the global in_features on a row-parallel A and then refuses its own input.
            part.out_features, part.in_features = part.weight.shape
    return adapted


def planned_shards(model: nn.Module, tp_group: dist.ProcessGroup) -> list[AdapterShard]:
    """Return the adapters with the layout that the plan of their base linears gives them. Collective over tp_group.

    Raises PlacementError for a plan under which PEFT shards no adapter.
    """
    layers = list(lora_layers(model))
    plans = [_plan(fqn, layer) for fqn, layer in layers]
    parts = [(layer.lora_A[FIRST_ADAPTER].weight, layer.lora_B[FIRST_ADAPTER].weight) for _, layer in layers]
    local = [A.shape[1] if plan == "rowwise" else B.shape[0] for (A, B), plan in zip(parts, plans, strict=True)]
    return [
        AdapterShard(fqn, A, B, 1 if plan == "rowwise" else None, 0 if plan == "colwise" else None, sizes, tp_group)
        for (fqn, _), (A, B), plan, sizes in zip(layers, parts, plans, gather_lengths(local, tp_group), strict=True)
    ]


def _plan(fqn: str, layer: Any) -> str | None:
    plan = getattr(layer.get_base_layer(), "_hf_tp_plan", None)
    if plan not in ("colwise", "rowwise", None):
        raise PlacementError(
            f"'{fqn}' is sharded by transformers' plan '{plan}', for which PEFT shards no adapter; exclude it with "
            "placement.exclude, or train with another parallel.backend."
        )
    return plan
