"""Which framework has wrapped or sharded a host's model, and how the collector gets to see it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from plop_dist.errors import LayoutError, ModelError
from plop_dist.measure.protocols import ScorableModel

_ACCEPTED = (
    "pass a transformers model (plain, in DDP, sharded by fully_shard or by its own tp_plan), a DeepSpeed engine, or "
    "Megatron's list of model chunks"
)


@dataclass(frozen=True)
class Found:
    """A recognised model. backend and wrapper: words for scores.json; roots: all its modules are below these.

    wrap(exclude) gives the ScorableModel; keep() is a context that puts the sharding back as it was.
    """

    backend: str
    wrapper: str
    roots: tuple[nn.Module, ...]
    wrap: Callable[[Sequence[str]], ScorableModel]
    keep: Callable[[], AbstractContextManager[Any]] = nullcontext
    zero_stage: int = 0
    sequence_parallel: bool = False


def find(model: Any) -> Found:
    """Return how a host's model is to be wrapped. Local; imports only the framework that is recognised.

    Raises ModelError for what is no model of a known kind, LayoutError for sharding that hides the features.
    """
    chunks = list(model) if isinstance(model, list | tuple | nn.ModuleList) else [model]
    if not chunks or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        raise ModelError(f"score() cannot read a {type(model).__name__}; {_ACCEPTED}.")
    if any(_is_megatron(chunk) for chunk in chunks):
        return _megatron(chunks)
    if len(chunks) > 1:
        raise ModelError(f"score() got {len(chunks)} modules without a Megatron linear in any; {_ACCEPTED}.")
    module = chunks[0]
    if _is_a(module, "DeepSpeedEngine"):
        return _deepspeed(module)
    return _torch(module)


def _megatron(chunks: list[nn.Module]) -> Found:
    from plop_dist.backends.megatron.backend import wrap
    from plop_dist.backends.megatron.model import unwrap

    is_sharded = bool(unwrap(chunks[0]).config.sequence_parallel)
    return Found(
        "megatron", "megatron", tuple(chunks), lambda exclude: wrap(chunks, exclude),
        sequence_parallel=is_sharded,
    )  # fmt: skip


def _deepspeed(engine: Any) -> Found:
    stage = engine.zero_optimization_stage()
    if _is_a(engine, "PipelineEngine"):
        return Found("deepspeed", "pipeline", (engine,), _later("deepspeed.pipeline", engine), zero_stage=stage)
    if any(_is_a(module, "TensorParallel_Layer") for module in engine.modules()):
        return Found("deepspeed", "autotp", (engine,), _later("deepspeed.autotp", engine), zero_stage=stage)
    keep: Callable[[], AbstractContextManager[Any]] = nullcontext
    if stage == 3:
        from plop_dist.backends.deepspeed.zero import as_partitioned

        keep = lambda: as_partitioned(engine)  # noqa: E731
    return Found("deepspeed", "zero", (engine,), _later("deepspeed.backend", engine), keep, zero_stage=stage)


def _torch(module: nn.Module) -> Found:
    wrapper = "plain"
    while True:
        if _is_a(module, "DistributedDataParallel"):
            module, wrapper = module.module, "ddp"  # type: ignore[assignment]
        elif _is_a(module, "OptimizedModule"):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            break
    units = [one for one in module.modules() if _is_a(one, "FSDPModule")]
    if any(_is_a(one, "FullyShardedDataParallel") for one in module.modules()):
        raise ModelError("the model is wrapped in FullyShardedDataParallel (FSDP1); shard it with fully_shard (FSDP2).")
    _check_forward(module)
    if units:
        if module not in units:
            raise LayoutError(
                f"fully_shard was applied below {type(module).__name__} but not to it; apply it to the whole model "
                "last, as FSDP2 expects."
            )
        from plop_dist.backends.torch import fsdp

        return Found(
            "transformers", "fsdp2", (module,), lambda exclude: fsdp.wrap(module, exclude),
            lambda: fsdp.as_sharded(module),
        )  # fmt: skip
    if (getattr(module, "_tp_size", None) or 1) > 1:  # transformers 5.12 keeps plain local weights, not DTensors
        return Found("transformers", "tp_plan", (module,), _later("hf.tp_plan", module))
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise LayoutError(
            f"{type(module).__name__} holds DTensors that neither fully_shard nor transformers' tp_plan made, so that "
            "its sharding is not known; load it with tp_plan='auto', or score it before parallelize_module."
        )
    return Found("transformers", wrapper, (module,), lambda exclude: _whole(module, exclude))


def _whole(module: nn.Module, exclude: Sequence[str]) -> ScorableModel:
    """Return a module that every rank holds whole: each rank is a replica."""
    from plop_dist.backends.deepspeed.backend import data_parallel_groups
    from plop_dist.backends.hf.backend import whole_sites
    from plop_dist.backends.hf.load import needs_head
    from plop_dist.backends.hf.model import HFModel

    with_head = needs_head(list(exclude))
    groups = data_parallel_groups(uniform=False)
    return HFModel(module, whole_sites(module, with_head), groups=groups, with_head=with_head)


def _later(backend: str, model: Any) -> Callable[[Sequence[str]], ScorableModel]:
    """Return the wrap function of a backend's module, imported when it is called."""
    return lambda exclude: importlib.import_module(f"plop_dist.backends.{backend}").wrap(model, exclude)


def _is_megatron(chunk: nn.Module) -> bool:
    return any(cls.__module__.startswith("megatron.core.") for cls in type(chunk).__mro__) or any(
        _is_a(module, "MegatronModule") for module in chunk.modules()
    )


def _is_a(module: Any, class_name: str) -> bool:
    """Tell by name, so that no framework need be importable."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def _check_forward(module: nn.Module) -> None:
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [name for name in ("input_ids", "attention_mask") if name not in parameters and not takes_any]
    if missing:
        raise ModelError(
            f"{type(module).__name__}.forward takes no {' and no '.join(missing)}, so that score() cannot run it; "
            f"{_ACCEPTED}."
        )
