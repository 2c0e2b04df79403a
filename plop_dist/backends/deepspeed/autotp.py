"""Scores a model sharded by DeepSpeed's AutoTP, times data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from plop_dist.backends.deepspeed.late_dtype import loaded_to_be_cut
from plop_dist.backends.deepspeed.layout import check_tp
from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.load import load_hf_config, meta_model, needs_head
from plop_dist.backends.hf.model import HFModel, headless, pick_device
from plop_dist.backends.hf.shards import Shard, meta_twin, replica_groups, shard_sites
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError


def load(config: Config) -> HFModel:
    """Return this rank's shard of the model. Collective over the world.

    ZeRO-1 cuts up optimizer states alone, of which scoring has none: stages 0 and 1 hold the same.
    Raises ModelError, or LayoutError where a rank would be left without attention heads.
    """
    import deepspeed
    from deepspeed.module_inject.layers import TensorParallel_Layer

    tp = config.parallel.tp
    pick_device()
    hf_config = load_hf_config(config.model)
    check_tp(hf_config, tp)
    twin = meta_model(config.model, hf_config)
    refusal = f"parallel.tp is {tp}, but DeepSpeed's AutoTP cannot shard {type(twin).__name__}"
    remedy = "use parallel.zero_stage=3 with parallel.tp=1, or parallel.backend=megatron."
    try:
        with loaded_to_be_cut(config.model) as module:
            settings = _settings(config, next(module.parameters()).dtype)  # an embedding, which is converted at once
            engine: Any = deepspeed.initialize(model=module, config=settings)[0]
    except (AssertionError, ValueError) as error:  # what AutoTP raises for a family that it cannot cut
        raise LayoutError(f"{refusal} ({' '.join(str(error).split())}); {remedy}") from error
    body = headless(engine.module)  # the head is cut in any family
    if not any(isinstance(inner, TensorParallel_Layer) for inner in body.modules()):
        raise LayoutError(f"{refusal}: it leaves every layer whole on every rank; {remedy}")
    engine.eval()
    model = scorable(engine.module, twin, needs_head(config.placement.exclude))
    model.release = engine.destroy
    return model


def _settings(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": config.parallel.tp},
        # DeepSpeed refuses weights of another dtype than it is told.
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def wrap(engine: Any, exclude: Sequence[str]) -> HFModel:
    """Return a host's AutoTP engine (ZeRO 0 or 1) as the collector sees it. Collective over the world."""
    return scorable(engine.module, meta_twin(engine.module), needs_head(list(exclude)))


def scorable(module: nn.Module, twin: nn.Module, with_head: bool) -> HFModel:
    """Return a model that AutoTP has sharded as the collector sees it; adapters may wrap its linears. Collective.

    twin: the unsharded model on the meta device.
    """
    from deepspeed.utils import groups

    group: Any = groups.get_tensor_model_parallel_group()
    sites = [
        *shard_sites(twin, module, _shard_of, group, with_head=with_head),
        *find_expert_sites(module),
    ]
    num_parameters = sum(parameter.numel() for parameter in twin.parameters())
    return HFModel(module, sites, groups=replica_groups(group), with_head=with_head, num_parameters=num_parameters)


def _shard_of(path: str, module: nn.Module) -> Shard:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    # Subclasses cut fused weights by blocks of their own, or read another input.
    if type(module) is LinearLayer:
        return Shard.COLUMN_GATHERED if module.gather_output else Shard.COLUMN
    if type(module) is LinearAllreduce:
        return Shard.ROW
    if type(module) is nn.Linear:
        return Shard.WHOLE
    raise LayoutError(
        f"'{path}' is a {type(module).__name__} under AutoTP, whose shards cannot be told apart; use parallel.tp=1, or "
        "parallel.backend=megatron."
    )
