"""What a linear is there for where it is no plain part of attention or MLP: routers, and what lies in recurrent layers.

Told by how modules are put together, not by their names. A router has as many outputs as there are experts in its
block, or one (the gate of a shared expert). A recurrent layer (state-space, linear attention, short convolution) has a
depthwise convolution along the text beside its linears, or the configuration says that its attention is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from plop_dist.backends.hf.own_modules import parameter_shape
from plop_dist.exporters.holders import PASSED_BY_OUT_PROJ
from plop_dist.values.names import layer_index
from plop_dist.values.scores import Role

_RECURRENT_KINDS = ("linear", "mamba", "recurrent", "conv")  # parts of the words that stand in layer_types


class Roles:
    """Tells the roles of the linears among a model's modules, by path."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._config: Any = getattr(modules.get(""), "config", None)
        self._numbers: dict[str, frozenset[int]] = {}

    def role_of(self, path: str, num_outputs: int) -> Role | None:
        """Return the role of the linear at a path, None for a plain one. num_outputs: its output features."""
        layer, owner_path = layer_index(path), path.rpartition(".")[0]
        if layer is None:
            return None
        block = owner_path
        while block and self._num_weights(block) == 1:  # a module around the router alone
            block = block.rpartition(".")[0]
        numbers = self._num_experts(block) if layer_index(f"{block}.") is not None else frozenset()
        if num_outputs in numbers or (numbers and num_outputs == 1):
            return "router"
        if self._is_recurrent(owner_path, layer):
            is_passed = getattr(self._config, "model_type", None) in PASSED_BY_OUT_PROJ
            return "kernel" if is_passed and path.endswith(".out_proj") else "recurrent"
        return None

    def _num_weights(self, path: str) -> int:
        return sum(len(parameter_shape(parameter)) > 1 for parameter in self._modules[path].parameters())

    def _num_experts(self, block: str) -> frozenset[int]:
        """Return how many experts the sets of them below a block have: modules of one shape, or matrices in one."""
        if block not in self._numbers:
            numbers: set[int] = set()
            for module in self._modules[block].modules():
                if isinstance(module, nn.ModuleList | nn.ModuleDict):
                    shapes = {_shapes(child) for child in module.children()}
                    if len(shapes) == 1 and any(len(shape) > 1 for shape in next(iter(shapes))):
                        numbers.add(len(module))
                elif not isinstance(module, _ConvNd | nn.Linear | nn.Embedding):
                    for parameter in module.parameters(recurse=False):
                        numbers |= self._num_matrices(parameter_shape(parameter))
            self._numbers[block] = frozenset(numbers - {1})
        return self._numbers[block]

    def _num_matrices(self, shape: tuple[int, ...]) -> set[int]:
        """Return how many matrices a parameter may hold: its first size, or what the configuration calls experts."""
        if len(shape) > 2:
            return {shape[0]}
        if len(shape) < 2:
            return set()
        numbers = _expert_numbers(self._config)
        return {number for number in numbers if any(size > number and size % number == 0 for size in shape)}

    def _is_recurrent(self, owner_path: str, layer: int) -> bool:
        owner = self._modules[owner_path]
        if any(isinstance(child, nn.Conv1d) and 1 < child.groups == child.in_channels for child in owner.children()):
            return True
        text = self._config.get_text_config() if hasattr(self._config, "get_text_config") else None
        kinds = getattr(text, "layer_types", None) or ()
        is_mixer = hasattr(owner, "layer_idx")  # what keeps a state per layer, as MLPs do not
        return is_mixer and layer < len(kinds) and any(word in str(kinds[layer]) for word in _RECURRENT_KINDS)


def _shapes(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(parameter_shape(parameter) for parameter in module.parameters())


def _expert_numbers(config: Any) -> set[int]:
    """Return the numbers under keys of a configuration, and of those inside it, that speak of experts."""
    found: set[int] = set()
    for key, value in vars(config).items() if config is not None else ():
        if "expert" in key and isinstance(value, int) and value > 1:
            found.add(value)
        elif hasattr(value, "to_dict"):
            found |= _expert_numbers(value)
    return found
