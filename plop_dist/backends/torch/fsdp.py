"""A host's FSDP2 model (fully_shard) as the collector sees it: whole weights gathered one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plop_dist.backends.deepspeed.backend import data_parallel_groups
from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.linears import find_linears
from plop_dist.backends.hf.load import needs_head
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.sites import LinearSite
from plop_dist.errors import LayoutError
from plop_dist.measure.protocols import LocalWeight, Site


class FSDPSite(LinearSite):
    """A linear whose parameters are DTensors between forward passes and whole tensors during one."""

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection, gathered for the block. Collective over the model's mesh."""
        weight: Any = self.module.weight.detach()
        if isinstance(weight, DTensor):
            # With CPU offload the shards lie where the mesh's collectives cannot reach them.
            weight = weight.to(weight.device_mesh.device_type).full_tensor()
        weight_OI = weight.T if self._is_transposed else weight
        yield (LocalWeight(block.projection, block.take_rows(weight_OI)) for block in self.blocks)


class FSDPModel(HFModel):
    """HFModel under its own class's name; fully_shard gives the class another one."""

    def describe(self) -> dict[str, Any]:
        """Return architecture, number of parameters of the whole model, and dtype."""
        own = next(cls for cls in type(self.module).__mro__ if not issubclass(cls, FSDPModule))
        return {**super().describe(), "architecture": own.__name__}


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
    linears = [linear for linear in find_linears(module) if with_head or linear.blocks[0].projection.type != "lm_head"]
    sites: list[Site] = [*(FSDPSite(linear) for linear in linears), *find_expert_sites(module)]
    # The root and not the part below the head: only the root's own hooks start FSDP's forward.
    model = FSDPModel(module, sites, groups=data_parallel_groups(uniform=True), call=module, with_head=with_head)
    if mesh.device_type == "cuda":
        model.device = torch.device("cuda", torch.cuda.current_device())
    return model


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
