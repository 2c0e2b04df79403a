"""A host's FSDP2 model (fully_shard) as the collector sees it: whole weights gathered one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plop_dist.backends.hf.load import needs_head
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.whole import replica_per_rank, whole_sites
from plop_dist.backends.hosts import bare, is_a
from plop_dist.backends.record import Found
from plop_dist.errors import LayoutError, ModelError


class FSDPModel(HFModel):
    """HFModel under its own class's name; fully_shard gives the class another one."""

    def describe(self) -> dict[str, Any]:
        """Return architecture, number of parameters of the whole model, and dtype."""
        own = next(cls for cls in type(self.module).__mro__ if not issubclass(cls, FSDPModule))
        return {**super().describe(), "architecture": own.__name__}


def find(module: nn.Module) -> Found | None:
    """Return how a module that was given to fully_shard is to be wrapped, None for any other. Local.

    Raises ModelError for FSDP1, LayoutError where the whole model was not sharded last.
    """
    module, _ = bare(module)
    if any(is_a(one, "FullyShardedDataParallel") for one in module.modules()):
        raise ModelError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which has made flat parameters of its weights; "
            "call score() and placement.apply() before it is wrapped (then with use_orig_params=True, as adapters are "
            "trained beside frozen weights), or shard it with fully_shard (FSDP2)."
        )
    units = [one for one in module.modules() if isinstance(one, FSDPModule)]
    if not units:
        return None
    if module not in units:
        raise LayoutError(
            f"fully_shard was applied below {type(module).__name__} but not to it; apply it to the whole model last, "
            "as FSDP2 expects."
        )
    return Found("transformers", "fsdp2", (module,), lambda exclude: wrap(module, exclude), lambda: as_sharded(module))


def wrap(module: nn.Module, exclude: Sequence[str]) -> FSDPModel:
    """Return a module that was given to fully_shard, root included, as the collector sees it.

    Raises LayoutError if its parameters are not sharded over all ranks, or also over features.
    """
    # Between two backward passes of one step a host may keep every unit whole: no parameter is a DTensor then.
    states: list[Any] = [unit._get_fsdp_state() for unit in module.modules() if isinstance(unit, FSDPModule)]
    mesh = next(group.mesh_info.mesh for state in states for group in state._fsdp_param_groups)
    if mesh.size() != dist.get_world_size():
        raise LayoutError(
            f"the FSDP2 model lives on {mesh.size()} of {dist.get_world_size()} ranks (mesh {mesh}); shard it over all "
            "ranks, or call score() before it is combined with tensor or pipeline parallelism."
        )
    with_head = needs_head(list(exclude))
    sites = whole_sites(module, with_head, gather=gathered)
    # The root and not the part below the head: only the root's own hooks start FSDP's forward.
    model = FSDPModel(module, sites, groups=replica_per_rank(uniform=True), call=module, with_head=with_head)
    if mesh.device_type == "cuda":
        model.device = torch.device("cuda", torch.cuda.current_device())
    return model


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor]]:
    """Give parameters whole for the length of a block (see weight.Gather). Collective over the model's mesh."""
    yield [_whole(parameter.detach()) for parameter in parameters]


def _whole(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # With CPU offload the shards lie where the mesh's collectives cannot reach them.
    return cast(DTensor, parameter.to(parameter.device_mesh.device_type)).full_tensor()


@contextmanager
def as_sharded(module: nn.Module) -> Iterator[None]:
    """Shard again, on leaving, what was sharded before, and gather what was whole.

    The root stays whole after a forward without backward; all units do where a host accumulates gradients unsharded.
    After an error nothing is gathered: that is collective, and the other ranks may be elsewhere. FSDP gathers such
    units itself in the next forward.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    was_sharded = [any(isinstance(parameter, DTensor) for parameter in _own(unit)) for unit in units]
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        for unit, sharded in zip(units, was_sharded, strict=True):
            if sharded:
                unit.reshard()
            elif has_ended:
                unit.unshard()


def _own(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that fully_shard put into this unit's group and not into one further down."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
