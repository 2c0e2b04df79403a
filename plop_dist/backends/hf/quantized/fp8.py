"""The weights of transformers' own FP8 linears: float8 times a scale for each block of rows and columns, or for all."""

# O out_features, I in_features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # float8 activations


class Float8Reader:
    """FP8Linear, whose kernels need a GPU; without one transformers dequantises such checkpoints as it loads them."""

    methods = ("fp8",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the module is transformers' FP8 linear, with float8 values in it."""
        kinds = {cls.__name__ for cls in type(stored.module).__mro__ if cls.__module__.startswith("transformers.")}
        dtype = getattr(stored.values, "dtype", None)
        return "FP8Linear" in kinds and stored.name == "weight" and getattr(dtype, "itemsize", 2) == 1

    def read(self, stored: Stored) -> Weight:
        """Return the weight, dequantised by rows."""
        module: Any = stored.module
        values, scale, size = stored.values.detach(), module.weight_scale_inv.detach(), module.block_size

        def read(start: int, stop: int) -> Tensor:
            w_oI = values[start:stop].float()
            if size is None:
                return w_oI * scale.float()
            rows = torch.arange(start, stop, device=values.device) // size[0]
            columns = torch.arange(values.shape[1], device=values.device) // size[1]
            return w_oI * scale.float()[rows][:, columns]

        return Weight(tuple(values.shape), torch.float32, values.device, read, _ROUNDED_INPUTS)
