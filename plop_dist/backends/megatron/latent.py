"""Gradients of latent attention (MLA) under tensor parallelism: those of its rotary keys, summed over the ranks.

The rotary part of the keys is one for all heads, and each tensor-parallel rank has the gradient of its own heads.
megatron-core (0.19) sums them where it gathers tokens that Transformer Engine's replicated projection leaves on their
ranks, and nowhere else: not without sequence parallelism, and not behind the column-parallel projection of its own
layers. Training of the whole model would need the same.
"""

# s, b sequence, batch; w width of the latent and the rotary keys together

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def sum_rotary_gradients(chunks: Iterable[nn.Module]) -> None:
    """Have every latent attention of the chunks sum the gradients of its rotary keys over the tensor ranks. Local."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        attention: Any = module
        if hasattr(attention, "_qkv_down_projection") and attention.config.tensor_model_parallel_size > 1:
            attention._qkv_down_projection = _summed(attention, attention._qkv_down_projection)


def _summed(attention: Any, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    from megatron.core.tensor_parallel import mappings

    config, group = attention.config, attention.pg_collection.tp
    widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]

    def projected(hidden: Tensor) -> tuple[Tensor, Tensor]:
        q, kv_sbw = project(hidden)
        if kv_sbw.shape[-1] != sum(widths):  # column-parallel: its rows lie on ranks, each with all tokens
            kv_sbw = mappings.gather_from_tensor_model_parallel_region(kv_sbw, group=group)
            if config.sequence_parallel:
                kv_sbw = mappings.scatter_to_sequence_parallel_region(kv_sbw, group=group)
        if not config.sequence_parallel:
            latent, rotary = kv_sbw.split(widths, dim=-1)
            rotary = mappings.copy_to_tensor_model_parallel_region(rotary, group=group)  # its gradient is summed
            kv_sbw = torch.cat([latent, rotary], dim=-1)
        return q, kv_sbw

    return projected
