"""Megatron's modules, typed: torch gives every attribute of a module the type Tensor | Module."""

# O out_features, I in_features, of this rank

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn


class GroupedLinear(Protocol):
    """Transformer Engine's linear of several experts, whose weights are weight0, weight1, ...

    te_return_bias: whether a bias comes back beside the output instead of being added.
    """

    num_gemms: int
    use_bias: bool
    te_return_bias: bool


class FusedNorm(Protocol):
    """The norm that a Transformer Engine linear applies to its input first."""

    layer_norm_weight: Tensor
    layer_norm_bias: Tensor | None
    eps: float
    normalization: str
    zero_centered_gamma: bool


class Router(Protocol):
    """Megatron's router: gating gives logits, forward gives probabilities and the map of tokens to experts."""

    weight: Tensor
    bias: Tensor | None

    def gating(self, z: Tensor) -> Tensor:
        """Return logits (..., E)."""
        ...


def grouped(module: nn.Module) -> GroupedLinear:
    """Return a module whose linear_kind is one of the grouped ones."""
    return cast(GroupedLinear, module)


def fused_norm(module: nn.Module) -> FusedNorm | None:
    """Return the norm inside a linear, None where its input is normed elsewhere."""
    return None if getattr(module, "layer_norm_weight", None) is None else cast(FusedNorm, module)


def weight_name(slot: int | None) -> str:
    """Return the attribute that holds a linear's weight; slot: which of a grouped linear's."""
    return "weight" if slot is None else f"weight{slot}"


def weight_of(module: nn.Module, slot: int | None = None) -> Tensor:
    """Return the parameter that is a linear's weight, for its shape; slot: which of a grouped linear's."""
    return cast(Tensor, getattr(module, weight_name(slot)))


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a linear's bias, (O,), None where it has none: Transformer Engine then holds an empty tensor."""
    bias: Any = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) and bias.numel() else None
