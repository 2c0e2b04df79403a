"""Norms over the queries or keys of all heads, where tensor-parallel ranks hold some heads each (OLMoE).

Megatron-Bridge builds them over the whole width and calls them on a rank's share, which fails.
"""

# s, b sequence, batch; w this rank's features

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def share_wide_norms(chunk: nn.Module) -> None:
    """Have every norm of a chunk that is wider than what it will read add up its squares over the tensor ranks."""
    for module in chunk.modules():
        for name, heads in (("q", "num_attention_heads_per_partition"), ("k", "num_query_groups_per_partition")):
            norm: Any = getattr(module, f"{name}_layernorm", None)
            weight, num_heads = getattr(norm, "weight", None), getattr(module, heads, None)
            if weight is None or num_heads is None:
                continue
            head: Any = module.hidden_size_per_attention_head
            if weight.numel() not in (head, num_heads * head) and weight.numel() % (num_heads * head) == 0:
                norm.forward = _over_ranks(norm)


def _over_ranks(norm: Any) -> Callable[[Tensor], Tensor]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    group: Any = parallel_state.get_tensor_model_parallel_group()
    rank = parallel_state.get_tensor_model_parallel_rank()

    def forward(x_sbw: Tensor) -> Tensor:
        width = x_sbw.shape[-1]
        z = x_sbw.float()
        # Summed forward, and its gradient too: every rank divides by the sum.
        squares = mappings.reduce_from_tensor_model_parallel_region(z.square().sum(-1, keepdim=True), group=group)
        squares = mappings.copy_to_tensor_model_parallel_region(squares, group=group)
        gain = norm.weight.float() + (1 if norm.zero_centered_gamma else 0)
        scale = torch.rsqrt(squares / gain.numel() + norm.eps)
        return (z * scale * gain[rank * width : (rank + 1) * width]).to(x_sbw.dtype)

    return forward
