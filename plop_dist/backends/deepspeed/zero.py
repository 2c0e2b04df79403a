"""Data-parallel ranks at any ZeRO stage: loaded, wrapped, gathered, and left as partitioned as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.hf.dtype import weights_dtype
from plop_dist.backends.hf.load import load_hf_config, load_model, meta_model, needs_head
from plop_dist.backends.hf.memory import freed_at_once
from plop_dist.backends.hf.model import HFModel, pick_device
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config


def load(config: Config) -> HFModel:
    """Return the loaded model: whole on every rank, partitioned at stage 3. Collective over the world.

    Raises ModelError.
    """
    if config.parallel.zero_stage == 3 and dist.is_initialized():
        return _load_partitioned(config)
    # Without gradients and optimizer states, stages 0 to 2 hold the same: whole weights on every rank.
    module = load_model(config.model).to(pick_device())
    return whole_model(module, needs_head(config.placement.exclude))


def wrap(engine: Any, exclude: Sequence[str]) -> HFModel:
    """Return a host's engine (ZeRO 0 to 3, no tensor or pipeline parallelism) as the collector sees it. Local."""
    return whole_model(
        engine.module,
        needs_head(list(exclude)),
        gather=gathered if engine.zero_optimization_partition_weights() else None,
        call=engine,
        num_parameters=sum(
            getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()
        ),
    )


def wrap_module(module: nn.Module, exclude: Sequence[str]) -> HFModel:
    """Return a module that zero.Init has partitioned, and that has no engine yet, as the collector sees it. Local."""
    return whole_model(
        module,
        needs_head(list(exclude)),
        gather=gathered,
        call=_GatheredCall(module),
        num_parameters=sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()),
    )


class _GatheredCall:
    """Calls a module, each part of which has its parameters whole while it runs, as an engine's hooks would do it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        running: list[tuple[nn.Module, ExitStack]] = []

        def enter(part: nn.Module, _: Any) -> None:
            stack = ExitStack()
            stack.enter_context(gathered(list(part.parameters(recurse=False))))
            running.append((part, stack))

        def leave(part: nn.Module, *_: Any) -> None:
            assert running[-1][0] is part, "modules end in the order opposite to that in which they began"
            running.pop()[1].close()

        with ExitStack() as hooks:
            for part in self.module.modules():
                if any(hasattr(parameter, "ds_id") for parameter in part.parameters(recurse=False)):
                    # Before and after everybody else's hooks, which read weights and biases.
                    hooks.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
                    hooks.callback(part.register_forward_hook(leave).remove)
            try:
                return self.module(**inputs)
            finally:
                for _, stack in reversed(running):
                    stack.close()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor]]:
    """Give partitioned parameters whole for the length of a block (see weight.Gather). Every rank must enter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield parameters


@contextmanager
def as_partitioned(engine: Any) -> Iterator[None]:
    """Release, on leaving, the parameters that were released before. Local; DeepSpeed keeps some whole for reuse.

    After an error all are released, those that stay whole between steps too: the next forward gathers them.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = list(engine.module.parameters())
    released = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    try:
        yield
    except BaseException:
        # A forward that broke off leaves gathers under way and modules that count as active.
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        offload.get_param_coordinator().release_and_reset_all(engine.module)
        raise
    left = [parameter for parameter in released if parameter.ds_status is ZeroParamStatus.AVAILABLE]
    if left:
        left[0].partition(left)


def _load_partitioned(config: Config) -> HFModel:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    device = pick_device()
    # Before any from_pretrained, or transformers and TRL miscount the ranks.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **_gathered_at_most(config)},
    }
    if weights_dtype(config.model, load_hf_config(config.model)) is torch.bfloat16:
        settings["bf16"] = {"enabled": True}  # else zero.Init keeps the parts in float32
    # While this object lives, from_pretrained builds under zero.Init: each parameter is cut up as soon as it exists.
    partitioning = HfDeepSpeedConfig(settings)
    module = load_model(config.model)
    engine: Any = deepspeed.initialize(model=module, config=settings)[0]
    del partitioning
    engine.eval()
    model = wrap(engine, config.placement.exclude)
    model.device = device
    model.release = _released(engine)
    return model


def _released(engine: Any) -> Callable[[], None]:
    """Return what gives an engine back; until then what it gathered leaves the process as it is partitioned again."""
    stack = ExitStack()
    stack.callback(engine.destroy)
    stack.enter_context(freed_at_once())
    return stack.close


def _gathered_at_most(config: Config) -> dict[str, int]:
    """Return how many parameters are whole at a time: an eighth of a rank's share, and the module that runs.

    DeepSpeed would keep up to 10^9, which is all of many a model, on every rank.
    """
    sizes = [parameter.numel() for parameter in meta_model(config.model).parameters()]
    most = max(1, sum(sizes) // (8 * dist.get_world_size()))
    return {
        "stage3_max_live_parameters": most,
        "stage3_max_reuse_distance": most,
        "stage3_prefetch_bucket_size": most // 2,
    }
