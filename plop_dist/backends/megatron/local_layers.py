"""Megatron's own layers, for where Transformer Engine is not installed: the specification that Bridge's models take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from plop_dist.backends.megatron.norm import apply_norm


def use_local_layers(provider: Any) -> None:
    """Have a Bridge provider build these layers."""
    provider.transformer_layer_spec = block_spec
    provider.moe_grouped_gemm = False


def block_spec(provider: Any, vp_stage: int | None = None) -> Any:
    """Return Megatron's own layers for this stage, with norms that allow more than theirs."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    has_latent_heads = provider.multi_latent_attention
    block: Any = get_gpt_decoder_block_spec(
        provider, use_transformer_engine=False, normalization=provider.normalization, vp_stage=vp_stage
    )
    block.layer_norm = _local_norm
    for layer in block.layer_specs:
        if has_latent_heads:
            layer.submodules.self_attention.submodules.core_attention = _latent_attention()
        for holder in (layer.submodules, layer.submodules.self_attention.submodules):
            for name, value in vars(holder).items():
                if getattr(value, "__name__", "") == "WrappedTorchNorm":
                    is_unused = name == "q_layernorm" and has_latent_heads and provider.q_lora_rank is None
                    setattr(holder, name, IdentityOp if is_unused else _local_norm)
    return block


@functools.cache
def _latent_attention() -> type:
    """Return Megatron's own attention for latent heads, whose keys and values differ in width; it has none."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LocalMLAttention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if v_channels is not None:  # Megatron builds it twice, first without
                self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    return LocalMLAttention


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as Transformer Engine computes them; see apply_norm.

    Megatron's WrappedTorchNorm refuses zero_centered_gamma and sequence parallelism.
    """

    def __init__(self, hidden_size: int, eps: float, normalization: str, zero_centered_gamma: bool, is_sharded: bool):
        super().__init__()
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 0.0 if zero_centered_gamma else 1.0))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if normalization == "LayerNorm" else None
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", is_sharded)  # noqa: B010  # gradients are summed over tp

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed activations, same shape and dtype as x."""
        return apply_norm(
            x, self.weight, self.bias, self.eps, self.normalization, zero_centered_gamma=self.zero_centered_gamma
        )


def _local_norm(config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> LocalNorm:
    return LocalNorm(
        hidden_size, eps, config.normalization, config.layernorm_zero_centered_gamma, config.sequence_parallel
    )
