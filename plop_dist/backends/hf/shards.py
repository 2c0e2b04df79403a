"""How linears that a framework has cut into column or row shards become sites, and which ranks are replicas.

The logical names and global sizes come from the same model on the meta device: a sharded module knows only its own.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.linears import LinearModule, find_linears
from plop_dist.backends.hf.sites import LinearSite, wrapped
from plop_dist.errors import LayoutError
from plop_dist.measure.protocols import Groups, Part, Site
from plop_dist.measure.weight import Stored, find_weight


class Shard(enum.Enum):
    """How a linear's weight is spread over the tensor-parallel group."""

    WHOLE = "whole"  # the same on every rank
    COLUMN = "column"  # rows of W, hence output features; the input is whole and the output local
    COLUMN_GATHERED = "column, output gathered"  # the same, but the module returns the whole output
    ROW = "row"  # columns of W, hence input features; the input is local and the output summed


def shard_sites(
    twin: nn.Module,
    module: nn.Module,
    shard_of: Callable[[str, nn.Module], Shard],
    tp_group: dist.ProcessGroup,
    *,
    with_head: bool,
    observe_last: bool = False,
) -> list[Site]:
    """Return one site per linear of a sharded model. Collective over `tp_group`.

    twin: the unsharded model on the meta device. module: the sharded one, whose linears adapters may wrap.
    shard_of(path, module): how a linear is cut. observe_last: the row-parallel sum is a hook on the module, as in
    transformers, rather than part of its forward.
    Raises LayoutError for a fused linear whose shards are not whole periods of its projections.
    """
    linears = [linear for linear in find_linears(twin) if with_head or linear.blocks[0].projection.type != "lm_head"]
    linears = [replace(linear, module=module.get_submodule(linear.path)) for linear in linears]
    shards = [shard_of(linear.path, wrapped(linear.module)) for linear in linears]
    offsets = _row_offsets([wrapped(linear.module) for linear in linears], tp_group)
    sites: list[Site] = []
    for linear, shard, (start, stop, total) in zip(linears, shards, offsets, strict=True):
        if shard is Shard.ROW:
            _check_row(linear, total)
            own = slice(start, stop)
            site = LinearSite(linear, in_part=Part.PARTIAL, is_sharded=True, in_index=own, observe_last=observe_last)
        elif shard is Shard.WHOLE:
            site = LinearSite(linear)
        else:
            _check_column(linear, shard, tp_group)
            out_part = Part.PARTIAL if shard is Shard.COLUMN else Part.WHOLE
            site = LinearSite(linear, out_part=out_part, is_sharded=True)
        sites.append(site)
    return sites


def replica_groups(tp_group: dist.ProcessGroup) -> Groups:
    """Return the groups of a model whose features are cut over `tp_group`. Collective over the world."""
    own = tuple(dist.get_process_group_ranks(tp_group))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    replicas = sorted(set(every))
    index, count = replicas.index(own), len(replicas)
    return Groups(features={"tp": tp_group}, copies={"tp": (index, count)}, replica=index, num_replicas=count)


def meta_twin(module: nn.Module) -> nn.Module:
    """Return the model of a host's transformers module, unsharded, on the meta device."""
    with torch.device("meta"):
        return type(module)(copy.deepcopy(module.config)).eval()


def _row_offsets(modules: Sequence[Any], tp_group: dist.ProcessGroup) -> list[tuple[int, int, int]]:
    """Return per module where this rank's input features begin and end if ranks follow one another, and their sum."""
    every: list[Any] = [None] * dist.get_world_size(tp_group)
    dist.all_gather_object(every, [find_weight(Stored(module)).shape[1] for module in modules], group=tp_group)
    rank = dist.get_rank(tp_group)
    found = []
    for widths in zip(*every, strict=True):
        start = sum(widths[:rank])
        found.append((start, start + widths[rank], sum(widths)))
    return found


def _check_row(linear: LinearModule, total: int) -> None:
    wanted = linear.blocks[0].projection.in_features
    if total != wanted or linear.is_transposed:
        raise LayoutError(
            f"'{linear.path}': the row shards hold {total} input features, but the model has {wanted}; this module's "
            "sharding is not understood: use parallel.tp=1, or parallel.backend=megatron."
        )


def _check_column(linear: LinearModule, shard: Shard, tp_group: dist.ProcessGroup) -> None:
    rows, _ = find_weight(Stored(wrapped(linear.module), path=linear.path)).shape
    is_cut = any(block.rows is not None and rows % block.rows.period for block in linear.blocks)
    is_gathered = shard is Shard.COLUMN_GATHERED
    has_bias = getattr(wrapped(linear.module), "bias", None) is not None
    if is_cut or linear.is_transposed or (is_gathered and (has_bias or len(linear.blocks) > 1)):
        names = ", ".join(block.projection.type for block in linear.blocks)
        raise LayoutError(
            f"'{linear.path}' ({names}): its shards over parallel.tp {dist.get_world_size(tp_group)} cannot be told "
            "apart; use parallel.tp=1, or parallel.backend=megatron."
        )
