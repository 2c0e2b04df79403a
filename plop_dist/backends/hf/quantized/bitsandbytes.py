"""The weights of bitsandbytes' linears: nf4 and fp4, by blocks of 64 and more, and int8, by rows."""

# O out_features, I in_features

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # one large feature leaves few of int8's steps for the others


class FourBitReader:
    """Linear4bit: two values a byte, a scale for each block of values, the scales quantised once more or not."""

    methods = ("bitsandbytes",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the parameter is bitsandbytes' own."""
        return type(getattr(stored.module, stored.name, None)).__name__ == "Params4bit"

    def read(self, stored: Stored) -> Weight:
        """Return the weight, dequantised by rows where they hold whole blocks."""
        module: Any = stored.module
        packed, state = _as_stored(stored.values.detach(), module.weight.quant_state)
        num_rows, num_columns = state.shape
        if num_columns % state.blocksize:
            whole = lambda: _dequantised(packed, state)  # noqa: E731
            return Weight.unpacked((num_rows, num_columns), state.dtype, packed.device, whole)
        scales = _scales(state)

        def read(start: int, stop: int) -> Tensor:
            part = copy.copy(state)
            part.nested, part.shape = False, torch.Size((stop - start, num_columns))
            part.absmax = scales[start * num_columns // state.blocksize : stop * num_columns // state.blocksize]
            return _dequantised(packed[start * num_columns // 2 : stop * num_columns // 2], part)

        return Weight((num_rows, num_columns), state.dtype, packed.device, read)


class EightBitReader:
    """Linear8bitLt: int8 with a scale for each row. Its kernel rounds the activations too, but for large features."""

    methods = ("bitsandbytes",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the parameter is bitsandbytes' own."""
        return type(getattr(stored.module, stored.name, None)).__name__ == "Int8Params"

    def read(self, stored: Stored) -> Weight:
        """Return the weight, dequantised by rows."""
        values = stored.values.detach()
        # The first forward pass moves the scales from the parameter to the module's state.
        scale = stored.values.SCB if getattr(stored.values, "SCB", None) is not None else _state(stored.module).SCB

        def read(start: int, stop: int) -> Tensor:
            return values[start:stop].float() * (scale[start:stop, None].float() / 127)

        return Weight(tuple(values.shape), torch.float32, values.device, read, _ROUNDED_INPUTS)


def keep_order_of_rows(model: nn.Module) -> None:
    """Keep bitsandbytes from ordering 4-bit weights anew for CPUs with AVX512-BF16. Local.

    Its kernel for that order (bitsandbytes 0.50) has no backward pass: once such a model was evaluated, training goes
    on with gradients that lack what flows through its linears. It also rounds scales and activations to bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _state(module: Any) -> Any:
    return module.state


def _as_stored(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return the bytes in the order of rows, flat, and their state; some CPUs' kernels keep them in another one."""
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scales = state.absmax.T.reshape(-1).float()
        plain = copy.copy(state)
        plain.original_nested = False  # or it would round the scales anew
        packed, state = _convert_weight_packed_for_cpu_inverse(packed, plain)
        state.absmax, state.nested = scales, False
    return packed.view(torch.uint8).reshape(-1), state


def _scales(state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _dequantised(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)
