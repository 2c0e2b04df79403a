"""PEFT's adapters on a host's model: in one process, in DDP, under fully_shard, in a DeepSpeed engine."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.hosts import bare, is_a
from plop_dist.errors import LayoutError


def adapt_plain(model: Any, peft_config: Any) -> nn.Module:
    """Return PEFT's model around a module that every rank holds whole; adapters as on rank 0."""
    from peft import get_peft_model

    inner, _ = bare(model)
    adapted = get_peft_model(inner, peft_config)
    _broadcast(adapted)
    return adapted


def adapt_ddp(model: Any, peft_config: Any) -> nn.Module:
    """Return a new DistributedDataParallel with the old one's options: DDP knows only what was there when it was made.

    What had been compiled has to be compiled again.
    """
    from torch.nn.parallel import DistributedDataParallel

    wrapper = model if is_a(model, "DistributedDataParallel") else model._orig_mod
    adapted = adapt_plain(model, peft_config)
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


def _broadcast(model: nn.Module) -> list[nn.Parameter]:
    """Give all ranks rank 0's adapters, which are all that needs a gradient, and return them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if dist.is_available() and dist.is_initialized():
        for parameter in trained:
            dist.broadcast(parameter.data, src=0)
    return trained


def adapt_fsdp2(model: Any, peft_config: Any) -> nn.Module:
    """Put adapters into a module that was given to fully_shard, in place, and return it. Collective over the world.

    PEFT's own wrapper would call the root's forward past its hooks, which gather its parameters. The adapters, small
    beside the base, stay whole on every rank; their gradients are averaged as FSDP averages its own.
    """
    from peft import inject_adapter_in_model

    if peft_config.use_dora:
        raise LayoutError(
            "use_dora needs the norm of whole weights, which fully_shard has partitioned; leave it out, or call "
            "placement.apply() before fully_shard."
        )
    module, _ = bare(model)
    inject_adapter_in_model(peft_config, module)
    _freeze_gathered(module)
    for parameter in _broadcast(module):
        parameter.register_hook(_averaged)
    return model


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


def adapt_engine(engine: Any, peft_config: Any) -> Any:
    """Return a new DeepSpeed engine, of the same configuration, that trains adapters on the old one's module.

    The old engine is destroyed: its optimizer holds what is frozen from here on. An optimizer that the host gave it is
    made again with its class and defaults. Collective over the world.
    """
    import deepspeed
    from peft import get_peft_model

    stage = engine.zero_optimization_stage()
    if peft_config.use_dora and stage == 3:
        raise LayoutError(
            "use_dora needs the norm of whole weights, which ZeRO-3 has partitioned; leave it out, or use a stage "
            "below 3."
        )
    scheduler = engine.client_lr_scheduler
    if scheduler is not None and not callable(scheduler):
        raise LayoutError(
            "the engine has an lr_scheduler that is bound to the optimizer of the base model; give "
            "deepspeed.initialize a function lr_scheduler=lambda optimizer: ..., which apply() can call again, or a "
            "scheduler in the configuration."
        )
    given, options, module = engine.client_optimizer, dict(engine._config._param_dict), engine.module
    engine.destroy()
    adapted = get_peft_model(module, peft_config)
    trainable: Any = _broadcast(adapted)
    optimizer = given
    if given is not None and not callable(given):
        optimizer = type(given)(trainable, **given.defaults)
    return deepspeed.initialize(
        model=adapted,
        model_parameters=trainable,
        config=options,
        optimizer=optimizer,
        lr_scheduler=cast(Any, scheduler),
    )[0]
