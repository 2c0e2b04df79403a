"""Which backend a host's model belongs to: each record is shown the model until one knows it."""

from __future__ import annotations

from typing import Any

from torch import nn

from plop_dist.backends.hosts import is_a
from plop_dist.backends.record import Found, accepted
from plop_dist.errors import ModelError
from plop_dist.registry import BACKENDS, load, names


def find(model: Any) -> Found:
    """Return how a host's model is to be wrapped. Local; imports only the framework that is recognised.

    Backends of other packages are asked first, then megatron, deepspeed, torch, and at last transformers, which takes
    every module that is called like its own. A list of one module is that module.
    Raises ModelError for what is no model of a known kind, LayoutError for sharding that hides the features.
    """
    while is_a(model, "_FabricModule"):  # Lightning Fabric's shell, around whatever its strategy has made
        model = model._forward_module
    if isinstance(model, list | tuple | nn.ModuleList):
        model = model[0] if len(model) == 1 else list(model)
    for name in reversed(names(BACKENDS)):
        found = load(BACKENDS, name).find(model)
        if found is not None:
            return found
    if isinstance(model, list) and model and all(isinstance(chunk, nn.Module) for chunk in model):
        raise ModelError(f"score() got {len(model)} modules without a Megatron linear in any; {accepted()}.")
    raise ModelError(f"score() cannot read a {type(model).__name__}; {accepted()}.")
