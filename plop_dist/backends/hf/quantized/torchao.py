"""The weights of torchao's tensors, which stand in the place of a plain linear's: each kind dequantises itself."""

from __future__ import annotations

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # int8 and float8 activations, where the kind rounds them


class TorchAoReader:
    """Tensors of torchao, of whatever layout: int8, int4, float8, with or without rounded activations."""

    methods = ("torchao",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the tensor is of a class of torchao's that can be dequantised."""
        kind = type(stored.values)
        return any(cls.__module__.split(".")[0] == "torchao" for cls in kind.__mro__) and hasattr(kind, "dequantize")

    def read(self, stored: Stored) -> Weight:
        """Return the weight, dequantised whole: not every layout can be cut by rows."""
        values = stored.values.detach()
        num_rows, num_columns = values.shape

        return Weight.unpacked((num_rows, num_columns), values.dtype, values.device, values.dequantize, _ROUNDED_INPUTS)
