"""PEFT's adapters in one stage of a pipeline: put on, and their gradients clipped by the norm over all stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.errors import LayoutError
from plop_dist.training.adapters.placed import check_complete
from plop_dist.training.adapters.shards import AdapterShard, parameters_of, peft_shards
from plop_dist.training.adapters.tensor_parallel import mark_sharded
from plop_dist.training.sums import clip_factor, grad_norm
from plop_dist.values.placement import Placement


def add_stage_adapters(model: nn.Module, placement: Placement, peft_config: Any) -> list[AdapterShard]:
    """Put this stage's adapters into a model that holds other stages' layers as nn.Identity, and return them.

    What else the model holds is frozen. Collective over the world. Raises PlacementError or LayoutError unless the
    stages hold the chosen modules, and each of them some.
    """
    from peft import inject_adapter_in_model

    modules = dict(model.named_modules())
    here = [fqn for fqn in placement.modules if not isinstance(modules.get(fqn, nn.Identity()), nn.Identity)]
    _check_stages(here, placement)
    model.requires_grad_(False)
    of_stage = copy.copy(peft_config)
    of_stage.target_modules = set(here)  # PEFT would adapt what stands in for another stage's head
    inject_adapter_in_model(of_stage, model)
    shards = peft_shards(model)
    for parameter in parameters_of(shards):
        mark_sharded(parameter, True)  # DeepSpeed's ZeRO norm counts unmarked parameters on the first stage alone
    return shards


def clip_over_stages(
    engine: Any, shards: Sequence[AdapterShard], max_norm: float, seen: Callable[[float], None] | None = None
) -> None:
    """Have a PipelineEngine without ZeRO clip by the norm over all stages: its own misses the later ones.

    seen: is told the norm before clipping. The engine clips in each step, collectively over its pipeline.
    """
    group, device = engine.grid.get_pipe_parallel_group(), torch.device(engine.device)

    def clip() -> None:
        norm = grad_norm(shards, device, [group])
        if seen is not None:
            seen(norm)
        factor = clip_factor(norm, max_norm)
        for parameter in parameters_of(shards):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    engine.clip_fp32_gradients = clip


def _check_stages(here: Sequence[str], placement: Placement) -> None:
    stages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, list(here))
    check_complete({fqn for stage in stages for fqn in stage}, placement)
    if not all(stages):
        raise LayoutError(
            f"rank {stages.index([])}'s stage of the pipeline holds no chosen module, so that it has nothing to train; "
            "use fewer stages (parallel.pp), tensor parallelism instead, or placement.granularity=type."
        )
