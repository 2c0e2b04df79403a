"""A host's transformers model, plain or sharded by its own tensor-parallel plan: how it is recognised and wrapped."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from plop_dist.backends.hf import tp_plan
from plop_dist.backends.hf.load import needs_head
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.own_modules import without_adapters
from plop_dist.backends.hf.whole import whole_model
from plop_dist.backends.hosts import bare
from plop_dist.backends.record import Found
from plop_dist.errors import LayoutError


def find(module: nn.Module) -> Found:
    """Return how a module is to be wrapped. Local.

    Raises LayoutError for DTensors that nothing known has made.
    """
    module, wrapper = bare(module)
    module = without_adapters(module)
    if (getattr(module, "_tp_size", None) or 1) > 1:  # transformers 5.12 keeps plain local weights, not DTensors
        return Found("transformers", "tp_plan", (module,), lambda exclude: tp_plan.wrap(module, exclude))
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise LayoutError(
            f"{type(module).__name__} holds DTensors that neither fully_shard nor transformers' tp_plan made, so that "
            "its sharding is not known; load it with tp_plan='auto', or score it before parallelize_module."
        )
    return Found("transformers", wrapper, (module,), lambda exclude: wrap(module, exclude))


def wrap(module: nn.Module, exclude: Sequence[str]) -> HFModel:
    """Return a module that every rank holds whole: each rank is a replica."""
    return whole_model(module, needs_head(list(exclude)))
