"""How a host's module is recognised by its classes' names, so that no framework need be importable."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from plop_dist.backends.record import accepted
from plop_dist.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def is_a(module: Any, class_name: str) -> bool:
    """Tell whether an object's class has this name or inherits from one that has."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def bare(module: Any) -> tuple[Any, str]:
    """Return the module inside DDP's and torch.compile's wrappers, and "ddp" or "plain"."""
    wrapper = "plain"
    while True:
        if is_a(module, "DistributedDataParallel"):
            module, wrapper = module.module, "ddp"
        elif is_a(module, "OptimizedModule"):
            module = module._orig_mod
        else:
            return module, wrapper


def check_forward(module: nn.Module) -> None:
    """Raise ModelError for a module that is not called as transformers' models are."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [name for name in ("input_ids", "attention_mask") if name not in parameters and not takes_any]
    if missing:
        raise ModelError(
            f"{type(module).__name__}.forward takes no {' and no '.join(missing)}, so that score() cannot run it; give "
            f"score() a forward=, your own function of (model, batch), or {accepted()}."
        )
