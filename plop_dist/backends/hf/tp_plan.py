"""Scores a transformers model sharded by its own tensor-parallel plan, times data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.layout import check_tp
from plop_dist.backends.hf.load import load_hf_config, load_model, meta_model, needs_head
from plop_dist.backends.hf.model import HFModel, pick_device
from plop_dist.backends.hf.shards import Shard, meta_twin, replica_groups, shard_sites
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError

_SHARDS = {
    None: Shard.WHOLE,
    "colwise": Shard.COLUMN,
    # The gathering is a hook of transformers, and ours runs before it: there the output is still local.
    "colwise_gather_output": Shard.COLUMN,
    "rowwise": Shard.ROW,
}


def load(config: Config) -> HFModel:
    """Return this rank's shard of the model. Collective over the world.

    Raises ModelError, or LayoutError where the model has no tensor-parallel plan or its heads do not divide.
    """
    parallel, with_head = config.parallel, needs_head(config.placement.exclude)
    device = pick_device()
    hf_config = load_hf_config(config.model)
    check_tp(hf_config, parallel.tp)
    twin = meta_model(config.model, hf_config)
    mesh = init_device_mesh(device.type, (parallel.dp, parallel.tp), mesh_dim_names=("dp", "tp"))
    module = load_model(config.model, tp_plan="auto", device_mesh=mesh)
    return scorable(module, twin, mesh["tp"].get_group(), with_head)


def wrap(model: Any, exclude: Sequence[str]) -> HFModel:
    """Return a host's model, loaded with tp_plan="auto", as the collector sees it. Collective over the world."""
    return scorable(model, meta_twin(model), tp_group_of(model), needs_head(list(exclude)))


def tp_group_of(model: Any) -> dist.ProcessGroup:
    """Return the tensor-parallel ranks of a host's model that was loaded with tp_plan="auto"."""
    mesh = model._device_mesh
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def scorable(module: nn.Module, twin: nn.Module, group: dist.ProcessGroup, with_head: bool) -> HFModel:
    """Return a model sharded by its plan as the collector sees it; adapters may wrap its linears. Collective.

    twin: the unsharded model on the meta device. group: the tensor-parallel ranks.
    """
    experts = find_expert_sites(module)
    sites = shard_sites(twin, module, _shard_of, group, with_head=with_head, observe_last=True)
    num_parameters = sum(parameter.numel() for parameter in twin.parameters())
    return HFModel(
        module, [*sites, *experts], groups=replica_groups(group), with_head=with_head, num_parameters=num_parameters
    )


def _shard_of(path: str, module: nn.Module) -> Shard:
    plan = getattr(module, "_hf_tp_plan", None)
    if plan not in _SHARDS:
        raise LayoutError(
            f"'{path}' is sharded by transformers' plan '{plan}', whose activations cannot be told apart; use "
            "parallel.tp=1, or parallel.backend=megatron."
        )
    return _SHARDS[plan]
