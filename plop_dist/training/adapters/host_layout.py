"""What a layout of a host's model says of adapters: how they are put on, and how they are read out whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plop_dist.training.adapters.peft_files import peft_tensors
from plop_dist.values.placement import Placement


@dataclass(frozen=True)
class HostLayout:
    """One per wrapper that a backend finds around a host's model, named in registry.HOST_LAYOUTS.

    adapt(model, placement, peft_config) returns what the host trains from here on, with peft_config at the module that
    plop_dist.plugin.apply.unwrapped gives. tensors(model, module) returns the adapters under PEFT's names, on the CPU,
    whole on rank 0 at least. Both are collective over the world. is_whole: every rank has all modules, adapted by PEFT.
    """

    adapt: Callable[[Any, Placement, Any], Any]
    tensors: Callable[[Any, Any], dict[str, Tensor] | None] = lambda model, module: peft_tensors(module)
    is_whole: bool = True
