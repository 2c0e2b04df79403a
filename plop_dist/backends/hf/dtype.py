"""In which dtype a checkpoint's weights are loaded."""

from __future__ import annotations

from typing import Any

import torch

from plop_dist.config.schema import ModelConfig


def weights_dtype(model: ModelConfig, hf_config: Any) -> torch.dtype:
    """Return the dtype in which weights are loaded: model.dtype, or what the checkpoint's configuration says."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    dtype = getattr(hf_config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
