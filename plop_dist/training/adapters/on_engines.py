"""Adapters in a host's DeepSpeed engine: at any ZeRO stage, cut by AutoTP, or one stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from plop_dist.backends.deepspeed.pipeline import host_layers, stage_model
from plop_dist.backends.deepspeed.stack import Head
from plop_dist.errors import LayoutError
from plop_dist.exporters.task_type import heads_trained_whole
from plop_dist.training.adapters.host_layout import HostLayout
from plop_dist.training.adapters.initial import agreed_seed
from plop_dist.training.adapters.on_hosts import broadcast_trained
from plop_dist.training.adapters.peft_files import peft_tensors
from plop_dist.training.adapters.placed import check_draws, check_options
from plop_dist.training.adapters.saved import gather_tensors, whole_tensors
from plop_dist.training.adapters.shards import FIRST_ADAPTER
from plop_dist.training.adapters.stages import add_stage_adapters, clip_over_stages
from plop_dist.training.adapters.tensor_parallel import add_adapters, added_shards
from plop_dist.values.placement import Placement


def adapt_zero(engine: Any, placement: Placement, peft_config: Any) -> Any:
    """Return a new engine, of the same configuration, that trains PEFT's adapters on the old one's module. Collective.

    Raises LayoutError for DoRA, and for modules that PEFT trains whole, at stage 3.
    """
    from peft import get_peft_model

    if engine.zero_optimization_stage() == 3:
        if peft_config.use_dora:
            raise LayoutError(
                "use_dora needs the norm of whole weights, which ZeRO-3 has partitioned; leave it out, or use a stage "
                "below 3."
            )
        whole = peft_config.modules_to_save or heads_trained_whole(peft_config.task_type)
        if whole:
            raise LayoutError(
                f"PEFT trains copies of modules whole ({' or '.join(whole)}: modules_to_save, or the head in task_type="
                f"{peft_config.task_type}), which cannot be made of an engine's at ZeRO-3; call placement.apply() "
                "before deepspeed.initialize, use a stage below 3, or pass task_type=None to train adapters alone."
            )

    def adapt(module: Any) -> Any:
        adapted = get_peft_model(module, peft_config)
        broadcast_trained(adapted)
        return adapted

    return _with_adapters(engine, adapt, engine._config._param_dict)


def adapt_autotp(engine: Any, placement: Placement, peft_config: Any) -> Any:
    """Return a new engine that trains adapters sharded as AutoTP has cut the old one's linears. Collective.

    Raises LayoutError for options that they do not have, PlacementError for linears whose shards are not plain ones.
    """
    from deepspeed.utils import groups

    tp_group: Any = groups.get_tensor_model_parallel_group()
    check_options(peft_config, "AutoTP")
    check_draws(peft_config, tp_group)

    def adapt(module: Any) -> Any:
        add_adapters(module, placement, peft_config, tp_group, seed=agreed_seed())
        module.peft_config = {FIRST_ADAPTER: peft_config}
        return module

    # AutoTP would cut again what it has cut; the groups it made stay.
    options = {key: value for key, value in engine._config._param_dict.items() if key != "tensor_parallel"}
    return _with_adapters(engine, adapt, options, mpu=engine.mpu or groups)


def adapt_pipeline(engine: Any, placement: Placement, peft_config: Any) -> Any:
    """Return a new PipelineEngine that trains PEFT's adapters in the layers of the old one's stages. Collective.

    Raises LayoutError for a stage without a chosen module, ModelError for layers that are not of pipeline_layers.
    """
    stage: Any = stage_model(engine)
    layers, found = host_layers(engine), []

    def adapt(module: Any) -> Any:
        module.requires_grad_(False)
        found.extend(add_stage_adapters(stage, placement, peft_config))
        for layer in layers:
            if isinstance(layer, Head):
                layer.lm_head = stage.lm_head
        module.peft_config = {FIRST_ADAPTER: peft_config}
        broadcast_trained(module, engine.grid.get_data_parallel_group())
        return module

    renewed = _with_adapters(engine, adapt, engine._config._param_dict)
    clip_over_stages(renewed, found, renewed.gradient_clipping())
    return renewed


def _with_adapters(engine: Any, adapt: Callable[[Any], nn.Module], options: Mapping[str, Any], **more: Any) -> Any:
    """Return a new engine around what adapt makes of the old one's module.

    The old engine is destroyed: its optimizer holds what is frozen from here on. An optimizer that the host gave it is
    made again with its class and defaults.
    """
    import deepspeed

    scheduler = engine.client_lr_scheduler
    if scheduler is not None and not callable(scheduler):
        raise LayoutError(
            "the engine has an lr_scheduler that is bound to the optimizer of the base model; give "
            "deepspeed.initialize a function lr_scheduler=lambda optimizer: ..., which apply() can call again, or a "
            "scheduler in the configuration."
        )
    given, options, module = engine.client_optimizer, dict(options), engine.module
    engine.destroy()
    adapted = adapt(module)
    trainable: Any = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = given
    if given is not None and not callable(given):
        optimizer = type(given)(trainable, **given.defaults)
    return deepspeed.initialize(
        model=adapted,
        model_parameters=trainable,
        config=options,
        optimizer=optimizer,
        lr_scheduler=cast(Any, scheduler),
        **more,
    )[0]


def _autotp_tensors(engine: Any, module: Any) -> dict[str, Tensor] | None:
    return gather_tensors(whole_tensors(added_shards(module)))


def _stage_tensors(engine: Any, module: Any) -> dict[str, Tensor] | None:
    stage: Any = stage_model(engine)
    stage.peft_config = module.peft_config
    return gather_tensors(peft_tensors(stage))


ZERO = HostLayout(adapt_zero)
AUTOTP = HostLayout(adapt_autotp, _autotp_tensors, is_whole=False)
PIPELINE = HostLayout(adapt_pipeline, _stage_tensors, is_whole=False)
