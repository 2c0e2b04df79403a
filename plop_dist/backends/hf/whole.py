"""A model of which every rank holds each module whole, at least while its forward runs: each rank is a replica.

So are a single process, plain data parallelism, DDP, ZeRO at every stage, and FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.linears import LinearModule, find_linears
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.offload import OffloadedWeights, fetched, is_offloaded
from plop_dist.backends.hf.sites import LinearSite
from plop_dist.measure.protocols import Groups, Site
from plop_dist.measure.weight import Gather


def whole_model(
    module: nn.Module,
    with_head: bool,
    *,
    gather: Gather | None = None,
    twin: nn.Module | None = None,
    call: Callable[..., Any] | None = None,
    num_parameters: int | None = None,
) -> HFModel:
    """Return a transformers model as the collector sees it.

    gather: gives whole parameters where they are partitioned between forward passes (ZeRO-3), which are collective
    then. twin: see whole_sites. call, num_parameters: see HFModel.
    """
    is_away = gather is None and is_offloaded(module)
    sites = whole_sites(module, with_head, fetched(module) if is_away else gather, twin)
    return HFModel(
        module,
        sites,
        passing=OffloadedWeights(module, sites) if is_away else None,
        groups=replica_per_rank(uniform=gather is not None),
        call=call,
        with_head=with_head,
        num_parameters=num_parameters,
    )


def whole_sites(
    module: nn.Module, with_head: bool, gather: Gather | None = None, twin: nn.Module | None = None
) -> list[Site]:
    """Return the sites of a model none of whose features are sharded.

    gather: gives whole parameters where they are partitioned between forward passes (ZeRO-3, FSDP). twin: where
    adapters wrap linears of `module`, the same model without them, on the meta device; it may hold layers that
    `module`, a stage, does not.
    """
    linears = find_linears(module) if twin is None else _of_twin(twin, module)
    linears = [linear for linear in linears if with_head or linear.blocks[0].projection.type != "lm_head"]
    return [*(LinearSite(linear, gather=gather) for linear in linears), *find_expert_sites(module, gather)]


def replica_per_rank(uniform: bool) -> Groups:
    """Return the groups of ranks that all hold every module: each is a replica, and they share the baseline work.

    uniform: forward passes are collective, so that every rank must run as many.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Groups(copies={"tp": (rank, size)}, replica=rank, num_replicas=size, uniform_steps=uniform)


def _of_twin(twin: nn.Module, module: nn.Module) -> list[LinearModule]:
    modules = {path: inner for path, inner in module.named_modules() if not isinstance(inner, nn.Identity)}
    return [replace(linear, module=modules[linear.path]) for linear in find_linears(twin) if linear.path in modules]
