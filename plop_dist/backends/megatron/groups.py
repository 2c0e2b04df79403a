"""Where this rank stands in Megatron's parallel_state: its place on every axis, and the groups of its peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from plop_dist.measure.protocols import Groups


@dataclass(frozen=True)
class Place:
    """This rank on every axis that its sites, its micro-batches or its schedule depend on.

    is_sequence_parallel: tensor-parallel ranks share out the tokens between their linears.
    """

    tp_rank: int
    tp_size: int
    pp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    is_sequence_parallel: bool


def read_place(config: Any) -> Place:
    """Return this rank's place. config: the chunks' TransformerConfig. Local."""
    from megatron.core import parallel_state as state

    tp_size = state.get_tensor_model_parallel_world_size()
    return Place(
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        pp_size=state.get_pipeline_model_parallel_world_size(),
        cp_rank=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        ep_rank=state.get_expert_model_parallel_rank(),
        is_sequence_parallel=bool(config.sequence_parallel) and tp_size > 1,
    )


def read_groups(config: Any) -> Groups:
    """Return the process groups that parallel_state holds, as the collector wants them. Local."""
    from megatron.core import parallel_state

    state: Any = parallel_state  # annotated as if a group might be a number

    def named(group: Any) -> Any:
        return group if group is not None and dist.get_world_size(group) > 1 else None

    tp_group = named(state.get_tensor_model_parallel_group())
    ep_group = state.get_expert_model_parallel_group()
    data_group = state.get_data_parallel_group(with_context_parallel=True)
    copies = {"tp": (dist.get_rank(data_group), dist.get_world_size(data_group))}
    if config.num_moe_experts:
        expert_data_group = state.get_expert_data_parallel_group()
        copies["etp"] = (dist.get_rank(expert_data_group), dist.get_world_size(expert_data_group))
    num_replicas = state.get_data_parallel_world_size()
    return Groups(
        features={"tp": tp_group} if tp_group is not None else {},
        routing=ep_group if config.num_moe_experts else None,
        copies=copies,
        stage=str(state.get_pipeline_model_parallel_rank()),
        replica=state.get_data_parallel_rank(),
        num_replicas=num_replicas,
        uniform_steps=bool(config.num_moe_experts) and dist.get_world_size(ep_group) > 1 and num_replicas > 1,
    )
