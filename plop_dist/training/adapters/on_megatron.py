"""Adapters on a host's Megatron chunks, wrapped in Megatron's DDP or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.hosts import is_a
from plop_dist.backends.megatron.bridge import import_auto_bridge
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.names import conventional_names
from plop_dist.errors import LayoutError, PlacementError
from plop_dist.training.adapters.host_layout import HostLayout
from plop_dist.training.adapters.initial import agreed_seed, set_initial
from plop_dist.training.adapters.megatron_chunks import add_bridge_adapters, check_ranks, chunk_shards
from plop_dist.training.adapters.placed import check_complete, check_draws, check_options, sizes_of
from plop_dist.training.adapters.saved import gather_tensors, whole_tensors
from plop_dist.training.adapters.shards import FIRST_ADAPTER
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement

_DDP = "DistributedDataParallel"


def adapt_megatron(model: Any, placement: Placement, peft_config: Any) -> Any:
    """Return the chunks with Bridge's adapters, each in a new DDP if it was in one: that knows only what it was given.

    Collective over the world. Raises LayoutError for wrappers that shard parameters and for options that Bridge's
    adapters do not have, PlacementError for what Bridge cannot adapt as PEFT does.
    """
    from megatron.core import parallel_state as state

    chunks = list(model) if isinstance(model, list | tuple | nn.ModuleList) else [model]
    import_auto_bridge()
    tp_group: Any = state.get_tensor_model_parallel_group()
    check_options(peft_config, "Megatron")
    check_draws(peft_config, tp_group)
    sizes = sizes_of(placement, peft_config)
    check_ranks([rank for rank, _ in sizes.values()], dist.get_world_size(tp_group))
    _check_wrappers(chunks)
    if experts := [fqn for fqn in placement.modules if expert_index(fqn) is not None]:
        raise PlacementError(
            f"'{experts[0]}' is a routed expert, whose adapters placement.apply() does not put on Megatron's chunks; "
            "place with exclude=['*.experts.*'], or train with plop-dist run."
        )
    peft = bridge_adapters(placement, peft_config)
    bare = [unwrap(chunk) for chunk in chunks]
    modes = [chunk.training for chunk in bare]
    add_bridge_adapters(bare, peft)
    for chunk, mode in zip(bare, modes, strict=True):
        chunk.train(mode)
        chunk.peft_config = {FIRST_ADAPTER: peft_config}
    shards = chunk_shards(bare, conventional_names)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [shard.fqn for shard in shards])
    check_complete({fqn for fqns in every for fqn in fqns}, placement)
    set_initial(shards, agreed_seed())
    renewed = [_in_ddp(chunk, index) if is_a(chunk, _DDP) else chunk for index, chunk in enumerate(chunks)]
    return renewed if isinstance(model, list | tuple | nn.ModuleList) else renewed[0]


def bridge_adapters(placement: Placement, peft_config: Any) -> Any:
    """Return the Bridge object that adapts as PEFT's configuration says. Raises ExportError where it cannot."""
    _, scaling = next(iter(sizes_of(placement, peft_config).values()))
    return placement.to_megatron(
        engine="canonical", dim=peft_config.r, alpha=scaling * peft_config.r, dropout=peft_config.lora_dropout
    )


def _in_ddp(old: Any, index: int) -> nn.Module:
    """Return Megatron's DDP with the options of the old one, around the same module."""
    if old.remove_forward_pre_hook_handles:
        old.disable_forward_pre_hook(param_sync=False)
    for parameter in old.params_with_grad:
        if hasattr(parameter, "main_grad"):
            del parameter.main_grad  # a view of the old one's buffer, which is as large as all gradients
    return type(old)(old.config, old.ddp_config, old.module, disable_bucketing=index > 0)


def _check_wrappers(chunks: Sequence[nn.Module]) -> None:
    for chunk in chunks:
        inner: Any = chunk
        while inner is not unwrap(chunk):
            name = type(inner).__name__
            if not (is_a(inner, _DDP) or is_a(inner, "Float16Module")):
                raise LayoutError(
                    f"placement.apply() got a chunk in {name}, which shards parameters that adapters would come after; "
                    "give placement.to_megatron() to Megatron-Bridge before it is wrapped, e.g. as cfg.peft."
                )
            inner = inner.module


def _chunk_tensors(model: Any, module: Any) -> dict[str, Tensor] | None:
    chunks = list(model) if isinstance(model, list | tuple | nn.ModuleList) else [model]
    return gather_tensors(whole_tensors(chunk_shards(chunks, conventional_names)))


MEGATRON = HostLayout(adapt_megatron, _chunk_tensors, is_whole=False)
