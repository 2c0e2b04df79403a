"""The weights of linears that compressed-tensors has quantised: unpacked by its compressors, one for each format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plop_dist.measure.weight import Stored, Weight

_ROUNDED_INPUTS = 0.25  # where the scheme quantises activations, which a scheme of plain weights does not


class CompressedTensorsReader:
    """Linears with a quantization_scheme: packed, or unpacked by a forward pass, as compressed-tensors does it."""

    methods = ("compressed-tensors",)

    def knows(self, stored: Stored) -> bool:
        """Tell whether compressed-tensors has given the module a scheme for its weight."""
        scheme = getattr(stored.module, "quantization_scheme", None)
        return type(scheme).__module__.split(".")[0] == "compressed_tensors" and stored.name == "weight"

    def read(self, stored: Stored) -> Weight:
        """Return the weight, unpacked whole: of the formats some pack rows, some columns, some blocks of both."""
        module: Any = stored.module
        scheme = module.quantization_scheme
        rounding = 0.0 if scheme.input_activations is None else _ROUNDED_INPUTS
        scale, shape = module.weight_scale, (module.out_features, module.in_features)
        dtype = scale.dtype if scale.dtype.is_floating_point and scale.element_size() > 1 else torch.bfloat16
        return Weight.unpacked(shape, dtype, scale.device, lambda: _unpacked(module), rounding)


def _unpacked(module: Any) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus

    if module.quantization_status != QuantizationStatus.COMPRESSED:
        return module.weight.detach()
    scheme = module.quantization_scheme
    compressor: Any = BaseCompressor.get_value_from_registry(getattr(scheme.format, "value", scheme.format))
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return compressor.decompress({name: tensor.detach() for name, tensor in tensors.items()}, scheme)["weight"]
