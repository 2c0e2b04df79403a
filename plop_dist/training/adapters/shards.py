"""The adapters of one rank, under logical names: what of them lies here, and how they are gathered whole."""

# R rank, I in_features, O out_features

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

FIRST_ADAPTER = "default"  # PEFT's name of a model's first adapter


@dataclass(frozen=True)
class AdapterShard:
    """This rank's part of one adapter: delta W = scaling * B A.

    A: (R, I) or its shard along A_dim; B: (O, R) or its shard along B_dim; None: whole, the same on every rank of
    `group`. sizes: the lengths of the shards along the sharded feature dimension, in the order of the group's ranks;
    None: all are equal.
    """

    fqn: str
    A: Parameter
    B: Parameter
    A_dim: int | None = None
    B_dim: int | None = None
    sizes: tuple[int, ...] | None = None
    group: dist.ProcessGroup | None = None

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(R, I) of the whole A."""
        shape = [*self.A.shape]
        if self.A_dim is not None:
            shape[self.A_dim] = sum(self._lengths(self.A, self.A_dim))
        return shape[0], shape[1]

    def own_part(self, whole_RI: Tensor) -> Tensor:
        """Return what of a whole A lies on this rank."""
        if self.A_dim is None or self.group is None:
            return whole_RI
        return whole_RI.split(self._lengths(self.A, self.A_dim), dim=self.A_dim)[dist.get_rank(self.group)]

    def gather(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return whole A and B on the CPU from tensors laid out like this shard's (weights or gradients).

        Collective over `group`.
        """
        return self._whole(A, self.A_dim), self._whole(B, self.B_dim)

    def local_product(self) -> Tensor:
        """Return B A cut as the base weight is cut on this rank, (O_local, I_local), float32, on the CPU.

        A row-parallel base (A sharded along I) holds columns of W, any other rows of it. Collective over `group`.
        """
        is_row = self.A_dim == 1
        A = self._whole(self.A, None if is_row else self.A_dim)
        B = self._whole(self.B, self.B_dim if is_row else None)
        return B.float() @ A.float()

    def _whole(self, local: Tensor, dim: int | None) -> Tensor:
        if dim is None or self.group is None:
            return local.detach().cpu()
        shapes = [(*local.shape[:dim], size, *local.shape[dim + 1 :]) for size in self._lengths(local, dim)]
        parts = [local.new_empty(shape) for shape in shapes]
        dist.all_gather(parts, local.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim).cpu()

    def _lengths(self, local: Tensor, dim: int) -> list[int]:
        if self.group is None:
            return [local.shape[dim]]
        return [*(self.sizes or (local.shape[dim],) * dist.get_world_size(self.group))]


def lora_layers(model: nn.Module, adapter_name: str = FIRST_ADAPTER) -> Iterator[tuple[str, Any]]:
    """Return the layers that PEFT has put into a model, each with the path of the module that it wraps."""
    for path, module in model.named_modules():
        if adapter_name in getattr(module, "lora_A", {}):
            yield path.removeprefix("base_model.model."), module


def remove_wrapped(model: nn.Module, base_of: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put modules that adapters wrap back into their places.

    base_of: from any module of the model to the one that it wraps, None where it is no wrapper of an adapter.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            base = base_of(child)
            if base is not None:
                setattr(parent, name, base)


def remove_peft(model: nn.Module) -> None:
    """Take out of a model what PEFT has put into it: its layers, and the mark of them."""
    remove_wrapped(model, _peft_base)
    vars(model).pop("peft_config", None)


def _peft_base(module: Any) -> nn.Module | None:
    return module.get_base_layer() if FIRST_ADAPTER in getattr(module, "lora_A", {}) else None


def peft_shards(model: nn.Module) -> list[AdapterShard]:
    """Return the adapters that PEFT has put into a model, whole, by the paths of the modules that they wrap."""
    return [
        AdapterShard(path, layer.lora_A[FIRST_ADAPTER].weight, layer.lora_B[FIRST_ADAPTER].weight)
        for path, layer in lora_layers(model)
    ]


def parameters_of(shards: Sequence[AdapterShard]) -> list[Parameter]:
    """Return the adapters' parameters in a fixed order: A and B of each."""
    return [parameter for shard in shards for parameter in (shard.A, shard.B)]


def gather_lengths(local: Sequence[int], group: dist.ProcessGroup) -> list[tuple[int, ...]]:
    """Return of each length what all ranks of the group have in its place, in their order. Collective over `group`."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, list(local), group=group)
    return list(zip(*every, strict=True))
