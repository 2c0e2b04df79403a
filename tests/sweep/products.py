"""What torch is asked to multiply with a model's parameters: the truth of the sweep, with no hook of ours in it.

Gains follow from it in float64, one sample at a time, without padding.
"""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_COPIES = {"to", "float", "double", "type", "type_as", "contiguous", "clone"}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "baddbmm"}


@dataclass
class Product:
    """A matrix, (O, I), and what it was multiplied by, [(T, I), ...]; None in there where that could not be told."""

    weight_OI: Tensor
    inputs: list[Tensor | None] = field(default_factory=list)

    def mean_gain(self, rows_O: Tensor) -> tuple[float, int]:
        """Return the mean of ||W z|| / ||z|| over all tokens with z != 0, for some rows of W, and their number."""
        z_TI = torch.cat([z for z in self.inputs if z is not None]).double()
        norm_T = z_TI.norm(dim=1)
        z_TI, norm_T = z_TI[norm_T > 0], norm_T[norm_T > 0]
        gain_T = (z_TI @ self.weight_OI[rows_O].double().T).norm(dim=1) / norm_T
        return float(gain_T.mean()), len(gain_T)


class Products(TorchFunctionMode):
    """Keeps the products with (slices of) parameters: (name of the parameter, where the matrix begins) -> Product."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._known = {
            parameter.untyped_storage().data_ptr(): (name, 0)
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2
        }
        self._alive: list[Tensor] = []  # copies, whose memory must not become another tensor's
        self.found: dict[tuple[str, int], Product] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "linear":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._note(args[0] if args else kwargs["input"], weight)
        elif name == "addmm":
            self._note(args[1], args[2].T)
        elif name in _PRODUCTS:
            self._note_product(name, args)
        result = func(*args, **kwargs)
        if name in _COPIES and isinstance(result, Tensor) and (place := self._place(args[0])) is not None:
            self._alive.append(result)
            self._known.setdefault(result.untyped_storage().data_ptr(), place)
        return result

    def _note_product(self, name: str, args: Any) -> None:
        tensors = args[1:] if name in ("einsum", "baddbmm") else args
        tensors = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
        left, right = (*tensors, None, None)[:2]
        if not isinstance(right, Tensor) or not isinstance(left, Tensor):
            return
        for weight, other, is_right in ((right, left, True), (left, right, False)):
            if self._place(weight) is None or weight.dim() < 2:
                continue
            if name == "einsum" or other.dim() < 2:
                self._note(None, weight)
                continue
            z, weight = (other, weight.mT) if is_right else (other.mT, weight)
            if weight.dim() == 2:
                self._note(z, weight)
            elif weight.dim() == 3 and z.dim() == 3 and len(z) == len(weight):
                for z_TI, weight_OI in zip(z, weight, strict=True):
                    self._note(z_TI[z_TI.any(dim=1)], weight_OI)  # rows of 0: tokens that an expert does not get
            else:
                self._note(None, weight)

    def _place(self, tensor: Any) -> tuple[str, int] | None:
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            return None
        try:
            known = self._known.get(tensor.untyped_storage().data_ptr())
        except (NotImplementedError, RuntimeError):  # of vmap's tensors, which have none
            return None
        return None if known is None else (known[0], known[1] + tensor.storage_offset())

    def _note(self, z: Tensor | None, weight: Tensor) -> None:
        place = self._place(weight)
        if place is None or weight.dim() < 2:
            return
        with torch._C.DisableTorchFunction():
            product = self.found.setdefault(place, Product(weight.detach()))
            is_told = z is not None and weight.dim() == 2
            product.inputs.append(z.detach().reshape(-1, z.shape[-1]).clone() if is_told else None)  # type: ignore[union-attr]


@torch.no_grad()
def products_of(model: nn.Module, samples: Iterable[Tensor]) -> dict[tuple[str, int], Product]:
    """Return what the model multiplies by its parameters while it reads the samples, (s,) each, one by one."""
    with Products(model) as products:
        for sample in samples:
            model(input_ids=sample[None], attention_mask=torch.ones_like(sample[None]))
    return products.found
