"""PEFT's adapters on a host's model: in one process, in DDP, under fully_shard, under transformers' own plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plop_dist.backends.hf.tp_plan import tp_group_of
from plop_dist.backends.hosts import bare, is_a
from plop_dist.errors import LayoutError
from plop_dist.exporters.task_type import heads_trained_whole
from plop_dist.training.adapters.host_layout import HostLayout
from plop_dist.training.adapters.initial import agreed_seed, set_initial
from plop_dist.training.adapters.placed import check_draws, check_options
from plop_dist.training.adapters.saved import gather_tensors, whole_tensors
from plop_dist.training.adapters.shards import FIRST_ADAPTER
from plop_dist.training.adapters.tp_plan import add_planned, planned_shards
from plop_dist.values.placement import Placement


def adapt_plain(model: Any, placement: Placement, peft_config: Any) -> nn.Module:
    """Return PEFT's model around a module that every rank holds whole; adapters as on rank 0."""
    from peft import get_peft_model

    inner, _ = bare(model)
    adapted = get_peft_model(inner, peft_config)
    broadcast_trained(adapted)
    return adapted


def adapt_ddp(model: Any, placement: Placement, peft_config: Any) -> nn.Module:
    """Return a new DistributedDataParallel with the old one's options: DDP knows only what was there when it was made.

    What had been compiled has to be compiled again.
    """
    return _in_ddp(model, adapt_plain(model, placement, peft_config))


def adapt_plan(model: Any, placement: Placement, peft_config: Any) -> nn.Module:
    """Return PEFT's model around one that transformers' plan has sharded, in DDP again if it was.

    Without DDP the gradients of replicas are the host's to average, as they were.
    """
    inner, wrapper = bare(model)
    tp_group = tp_group_of(inner)
    check_options(peft_config, "transformers' tensor parallelism")
    check_draws(peft_config, tp_group)
    adapted = add_planned(inner, peft_config)
    set_initial(planned_shards(adapted, tp_group), agreed_seed())
    return _in_ddp(model, adapted) if wrapper == "ddp" else adapted


def _in_ddp(model: Any, adapted: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    wrapper = model if is_a(model, "DistributedDataParallel") else model._orig_mod
    return DistributedDataParallel(
        adapted,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        process_group=wrapper.process_group,
        broadcast_buffers=wrapper.broadcast_buffers,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )


def broadcast_trained(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[nn.Parameter]:
    """Give all ranks of a group its first one's adapters, which are all that needs a gradient, and return them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if dist.is_available() and dist.is_initialized():
        for parameter in trained:
            dist.broadcast(parameter.data, group_src=0, group=group)
    return trained


def adapt_fsdp2(model: Any, placement: Placement, peft_config: Any) -> nn.Module:
    """Put adapters into a module that was given to fully_shard, in place, and return it. Collective over the world.

    PEFT's own wrapper would call the root's forward past its hooks, which gather its parameters. The adapters, small
    beside the base, stay whole on every rank; their gradients are averaged as FSDP averages its own. So do the heads
    that PEFT trains with them, of which it makes copies.
    """
    from peft import inject_adapter_in_model
    from peft.utils import ModulesToSaveWrapper

    if peft_config.use_dora:
        raise LayoutError(
            "use_dora needs the norm of whole weights, which fully_shard has partitioned; leave it out, or call "
            "placement.apply() before fully_shard."
        )
    module, _ = bare(model)
    # Else added by PEFT's wrapper.
    more = heads_trained_whole(peft_config.task_type)
    peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), *more] or None
    with _whole_sizes(module, _trained_whole(module, peft_config)):
        inject_adapter_in_model(peft_config, module)
    _freeze_gathered(module)
    for parameter in broadcast_trained(module):
        parameter.register_hook(_averaged)
    for part in module.modules():
        if isinstance(part, ModulesToSaveWrapper):
            part.modules_to_save[FIRST_ADAPTER].register_forward_pre_hook(_in_own_dtype)
    return model


def _in_own_dtype(copied: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a copy its inputs as LoRA's layers take theirs: FSDP's mixed precision casts only what it shards."""
    dtype = next(copied.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)


def _trained_whole(module: nn.Module, peft_config: Any) -> list[nn.Module]:
    """Return the modules that PEFT will train whole. Raises LayoutError for one that is a unit of FSDP by itself."""
    from torch.distributed.fsdp import FSDPModule

    ends = tuple(peft_config.modules_to_save or ())
    heads = {path: part for path, part in module.named_modules() if ends and path.endswith(ends)}
    for path, head in heads.items():
        if any(isinstance(part, FSDPModule) for part in head.modules()):
            raise LayoutError(
                f"PEFT trains a copy of '{path}' (modules_to_save, or a head in task_type={peft_config.task_type}), "
                "which cannot be made where fully_shard was given that module by itself; leave it to the root, call "
                "placement.apply() before fully_shard, or pass task_type=None to train adapters alone."
            )
    return list(heads.values())


@contextmanager
def _whole_sizes(module: nn.Module, copied: Sequence[nn.Module]) -> Iterator[None]:
    """Show whole sizes to PEFT, which takes this rank's of a sharded weight unless the mesh has no name, or "fsdp".

    copied: what PEFT makes copies of; these are shown with their values. Of a parametrised linear, whose weight is
    computed from parameters below it, those are stood in for. Collective over the world.
    """
    sharded: dict[tuple[nn.Module, str], DTensor] = {}
    valued = dict.fromkeys(part for head in copied for part in head.modules())
    linears = [part for linear in module.modules() if isinstance(linear, nn.Linear) for part in linear.modules()]
    for holder in dict.fromkeys([*valued, *linears]):
        for name, parameter in holder._parameters.items():
            if isinstance(parameter, DTensor):
                sharded[holder, name] = parameter
                empty = parameter.to_local().new_empty(1)
                stand_in = parameter.full_tensor().detach() if holder in valued else empty.expand(parameter.shape)
                holder._parameters[name] = nn.Parameter(stand_in, parameter.requires_grad)
    try:
        yield
    finally:
        for (holder, name), parameter in sharded.items():
            parameter.requires_grad_(holder.get_parameter(name).requires_grad)  # PEFT freezes what it adapts
            holder._parameters[name] = parameter  # pyright: ignore[reportArgumentType]


def _averaged(gradient: Tensor) -> Tensor:
    gradient = gradient / dist.get_world_size()
    dist.all_reduce(gradient)
    return gradient


def _freeze_gathered(module: nn.Module) -> None:
    """Freeze the whole parameters that FSDP keeps for the next forward; PEFT has only seen the sharded ones."""
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            state: Any = unit._get_fsdp_state()
            for group in state._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    whole = getattr(parameter, "_unsharded_param", None)
                    if whole is not None:
                        whole.requires_grad_(parameter.sharded_param.requires_grad)


def _planned_tensors(model: Any, module: Any) -> dict[str, Tensor] | None:
    return gather_tensors(whole_tensors(planned_shards(module, tp_group_of(module))))


PLAIN = HostLayout(adapt_plain)
DDP = HostLayout(adapt_ddp)
FSDP2 = HostLayout(adapt_fsdp2)
TP_PLAN = HostLayout(adapt_plan, _planned_tensors, is_whole=False)
