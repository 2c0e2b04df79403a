"""The weights of BitNet's linears: the -1, 0 and 1, times a scale, that they multiply by, not those they come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # int8 activations, scaled by each token's largest


class BitNetReader:
    """transformers' BitLinear: four values in a byte. AutoBitLinear's are plain, and read by what it computes."""

    methods = ("bitnet",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the module is transformers' own."""
        kind = type(stored.module)
        is_own = kind.__module__.startswith("transformers.") and kind.__name__ == "BitLinear"
        return is_own and stored.name == "weight"

    def read(self, stored: Stored) -> Weight:
        """Return the weight, unpacked whole: the bits of a byte belong to rows that are far apart."""
        module: Any = stored.module
        dtype = torch.float32
        shape = (module.out_features, module.in_features)
        return Weight.unpacked(shape, dtype, module.weight.device, lambda: _unpacked(module), _ROUNDED_INPUTS)


def _unpacked(module: Any) -> Tensor:
    packed = module.weight.detach()
    parts = [(packed >> 2 * place & 3).float() - 1 for place in range(4)]
    return torch.cat(parts)[: module.out_features] / module.weight_scale.float()
