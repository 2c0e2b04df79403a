"""A rank's model chunks as modules: what is inside their wrappers, and how large the whole model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def unwrap(chunk: nn.Module) -> Any:
    """Return the model inside DDP, FSDP and Float16Module wrappers."""
    inner = getattr(chunk, "module", None)
    while isinstance(inner, nn.Module):
        chunk, inner = inner, getattr(inner, "module", None)
    return chunk


def device_of(chunks: Sequence[nn.Module]) -> torch.device:
    """Return where a rank's chunks compute; an uneven pipeline may leave a chunk, and a stage, without parameters."""
    parameter = next((parameter for chunk in chunks for parameter in chunk.parameters()), None)
    if parameter is not None:
        return parameter.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def count_parameters(chunks: Sequence[nn.Module], config: Any) -> int:
    """Return the number of parameters of the whole model. Collective over the pipeline's ranks."""
    from megatron.core import parallel_state as state

    ep = state.get_expert_model_parallel_world_size() if config.num_moe_experts else 1
    tp = state.get_tensor_model_parallel_world_size()
    total = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "shared_embedding", False) and not getattr(chunk, "pre_process", True):
                continue  # the last stage's copy of tied embeddings
            if ".experts." in name and "shared_experts" not in name:
                total += parameter.numel() * ep
            else:
                total += parameter.numel() * (tp if getattr(parameter, "tensor_model_parallel", False) else 1)
    count = torch.tensor([total], dtype=torch.int64, device=device_of(chunks))
    group: Any = state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(count, group=group)
    return int(count)
