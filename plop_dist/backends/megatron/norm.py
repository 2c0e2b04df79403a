"""The norms that Transformer Engine fuses into linears, computed apart."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, normalization: str, *, zero_centered_gamma: bool
) -> Tensor:
    """Return the normed activations, computed in float32; (..., I) as x, dtype of x.

    RMSNorm: x / sqrt(mean(x^2) + eps) * g; LayerNorm: (x - mean) / sqrt(var + eps) * g + bias; g = weight, or
    1 + weight with zero_centered_gamma.
    """
    gain = weight.float() + 1 if zero_centered_gamma else weight.float()
    if normalization == "RMSNorm":
        normed = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), gain, eps)
    else:
        offset = None if bias is None else bias.float()
        normed = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), gain, offset, eps)
    return normed.to(x.dtype)
