"""The weights of optimum-quanto's linears: int8, int4, int2 and float8, dequantised by its own tensors."""

from __future__ import annotations

from typing import Any

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # where activations are quantised, too


class QuantoReader:
    """QLinear, frozen or not: it multiplies by `qweight`, which it makes anew in every pass until it is frozen."""

    methods = ("quanto",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether the module is quanto's own kind of linear."""
        kinds = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(stored.module).__mro__}
        return "optimum.QLinear" in kinds and stored.name == "weight"

    def read(self, stored: Stored) -> Weight:
        """Return the weight, dequantised whole: groups of values may go over rows."""
        module: Any = stored.module
        weight = module.weight
        rounding = 0.0 if module.activation_qtype is None else _ROUNDED_INPUTS
        shape = (module.out_features, module.in_features)
        return Weight.unpacked(shape, weight.dtype, weight.device, lambda: module.qweight.dequantize(), rounding)
