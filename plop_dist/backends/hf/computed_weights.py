"""What a linear multiplies by whose forward makes another matrix of its weight (BitNet's ternary one, say)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from plop_dist.measure.weight import PlainReader, Stored, Weight, reader_of


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a linear's forward is another than nn.Linear's, its class's or put on it later.

    accelerate's, which brings weights and then calls the one that was there before, is none of its own.
    """
    put_on = vars(module).get("_old_forward", vars(module).get("forward"))
    own = type(module).forward if put_on is None else getattr(put_on, "__func__", put_on)
    return isinstance(module, nn.Linear) and own is not nn.Linear.forward


# What torch's linear was given and gave: z (..., I), a matrix (O, I), and the product (..., O) without bias.
Product = tuple[Tensor, Tensor, Tensor]


def note_products(module: nn.Module, shape: tuple[int, int], calls: list[list[Product]]) -> list[RemovableHandle]:
    """Have `calls` hold the products with a matrix of this shape in the module's last call; returns the hooks.

    It holds them for hooks on the module that were registered before.
    """
    running: list[_Multiplied] = []

    def begin(_module: nn.Module, _args: Any) -> None:
        running.append(_Multiplied(shape))
        running[-1].__enter__()

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        watch = running.pop()
        watch.__exit__(None, None, None)
        calls[:] = [watch.products]

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, prepend=True, always_call=True),  # also where its forward raises
    ]


class _Multiplied(TorchFunctionMode):
    """Keeps the products with a matrix of one shape, (O, I)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._shape = tuple(shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            if tuple(given["weight"].shape) == self._shape:
                bias = given.get("bias")
                y = result if bias is None else result - bias
                self.products.append((given["input"], given["weight"].detach(), y))
        return result


class _ComputedReader(PlainReader):
    """Linears with a forward of their own and plain values: the one matrix that torch is asked to multiply by."""

    def knows(self, stored: Stored) -> bool:
        return stored.name == "weight" and has_own_forward(stored.module) and super().knows(stored)

    def read(self, stored: Stored) -> Weight:
        """Return it, as one token of zeros shows it; the weight itself where there is no such product, or several.

        Raises ModelError where the values are not there.
        """
        weight = super().read(stored)
        values = weight.dense()
        token = values.new_zeros(1, 1, values.shape[1])
        alone: Any = copy.copy(stored.module)  # whose weight is whole; its forward is called past all hooks
        alone._parameters = {**alone._parameters, "weight": nn.Parameter(values, requires_grad=False)}
        with torch.no_grad(), _Multiplied(values.shape) as seen:
            try:
                alone.forward(token)
            except Exception:  # it takes other inputs; what becomes of them is seen in the forward pass
                return weight
        return Weight.of(seen.products[0][1]) if len(seen.products) == 1 else weight


COMPUTED_READER = _ComputedReader()


def is_computed(module: nn.Module) -> bool:
    """Tell whether what torch multiplies by in the module's forward is what its weight is read as."""
    return reader_of(Stored(module)) is COMPUTED_READER
