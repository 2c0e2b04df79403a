"""Which routers transformers multiplies with without calling them: no hook sees those, and no adapter reaches them."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def uncalled_routers(whole: nn.Module, known: Collection[str]) -> frozenset[str]:
    """Return the paths among `known` of linears whose weight the module around them takes for itself (DeepSeek-V2).

    Under transformers these have no score, so that they have none here either. whole: the Hugging Face model, on the
    meta device, where the module around is run as far as that goes: routing comes first.
    """
    return frozenset(
        path
        for path, module in whole.named_modules()
        if path in known and type(module) is nn.Linear and _is_router(whole, path) and not _is_called(whole, path)
    )


def _is_router(whole: nn.Module, path: str) -> bool:
    """Tell whether a linear stands beside routed experts and is none of them."""
    owner = whole.get_submodule(path.rpartition(".")[0])
    return any(name == "experts" for name, _ in owner.named_children())


def _is_called(whole: nn.Module, path: str) -> bool:
    owner, linear = whole.get_submodule(path.rpartition(".")[0]), whole.get_submodule(path)
    weight, calls = linear.get_parameter("weight"), []
    handle = linear.register_forward_pre_hook(lambda module, _: calls.append(module))
    hidden = torch.zeros(1, 2, weight.shape[1], device=weight.device, dtype=weight.dtype)
    try:
        # Experts ask for numbers of tokens, which there are none of on the meta device.
        with torch.no_grad(), _Uses(weight) as uses, suppress(Exception):
            owner(hidden)
    finally:
        handle.remove()
    return bool(calls) or not uses.seen


class _Uses(TorchFunctionMode):
    """Sees whether torch is given a tensor to compute with, which a look at its dtype is not."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor, self.seen = tensor, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_look = getattr(func, "__name__", "") == "__get__"
        self.seen |= not is_look and any(one is self._tensor for one in (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))
