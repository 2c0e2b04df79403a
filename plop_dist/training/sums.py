"""What is summed over ranks in training: losses and counts, and the squares of the gradient's norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.training.adapters.shards import AdapterShard


def sum_over(group: dist.ProcessGroup | None, *values: float, device: torch.device) -> list[float]:
    """Return each value summed over the group in float64. Collective over `group`; None: one rank."""
    if group is None:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def from_last(group: dist.ProcessGroup | None, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the tensors that the group's last rank has, on every rank of it. Collective over `group`; None: one rank.

    The others need not know how many there are, nor their shapes.
    """
    if group is None:
        return list(tensors)
    sent: list[Any] = [[tensor.cpu() for tensor in tensors]]
    dist.broadcast_object_list(sent, src=dist.get_process_group_ranks(group)[-1], group=group)
    return [tensor.to(device) for tensor in sent[0]]


def grad_norm(shards: Sequence[AdapterShard], device: torch.device, groups: Sequence[dist.ProcessGroup] = ()) -> float:
    """Return the norm of the whole adapter's gradient, from this rank's shards; the same on every rank.

    Squares of sharded parameters add up over their shard's group; whole ones, the same on every rank of it, count once.
    groups: over which all of that adds up (pipeline stages). Parameters without a gradient count for nothing.
    Collective over the shards' groups and `groups`.
    """
    sharded: dict[dist.ProcessGroup, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        for parameter, dim in ((shard.A, shard.A_dim), (shard.B, shard.B_dim)):
            group = None if dim is None else shard.group
            part = total if group is None else sharded.setdefault(group, torch.zeros_like(total))
            if parameter.grad is not None:
                part += parameter.grad.float().square().sum(dtype=torch.float64)
    for group, square in sharded.items():
        dist.all_reduce(square, group=group)
        total += square
    for group in groups:
        dist.all_reduce(total, group=group)
    return float(total) ** 0.5


def clip_factor(norm: float, max_norm: float) -> float:
    """Return by what gradients of this norm are multiplied so that it is at most max_norm, as torch does."""
    return min(1.0, max_norm / (norm + 1e-6))
