"""Megatron's fused kernels, switched off where they cannot run: they change how something is computed, never what."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

# What needs CUDA, and in part Transformer Engine or Apex.
_FUSIONS = (
    "bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm", "bias_dropout_fusion", "apply_rope_fusion",
    "cross_entropy_loss_fusion", "moe_permute_fusion", "moe_router_fusion", "memory_efficient_layer_norm",
    "gradient_accumulation_fusion", "fused_single_qkv_rope", "use_fused_weighted_squared_relu",
    "apply_dsa_kernel_fusion", "moe_apply_probs_on_input_fusion", "use_transformer_engine_op_fuser",
)  # fmt: skip


def switch_off(provider: Any, reason: str) -> None:
    """Switch every fusion of a Bridge provider off; the log names those that were on. reason: why, for the log."""
    were_on = [name for name in _FUSIONS if getattr(provider, name, False)]
    for name in were_on:
        setattr(provider, name, False)
    if were_on:
        logger.info("%s: switched off in Megatron: %s.", reason, ", ".join(were_on))
