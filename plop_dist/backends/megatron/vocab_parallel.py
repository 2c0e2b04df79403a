"""Logits whose vocabulary is cut over Megatron's tensor-parallel ranks."""

# b rows, s tokens of the longest, V entries of the vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabParallelLogits:
    """Logits (b, s, V_local) whose vocabulary is cut over `group` in the order of its ranks."""

    values: Tensor
    group: dist.ProcessGroup

    def log_probabilities(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return the log-probability of each target, (b, s), float32, of logits / temperature; 0 for negative ones.

        targets_bs: int64, the token that comes next. Differentiable. Collective over `group`.
        """
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        # A new tensor, because Megatron's own changes what it is given.
        losses = vocab_parallel_cross_entropy(self.values.float() / temperature, targets_bs.clamp_min(0))
        return -losses.masked_fill(targets_bs < 0, 0.0)

    def at(self, places_b: Tensor) -> Tensor:
        """Return each row's logits at one place, (b, V), float32, whole. Collective over `group`."""
        local = self.values[torch.arange(len(places_b), device=places_b.device), places_b].float().contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat(parts, dim=-1)
