"""LoRA on the sharded linears of DeepSpeed's AutoTP, which PEFT refuses.

Column-parallel (rows of W on ranks): A is whole, B is sharded with the rows. Row-parallel (columns of W on ranks): A is
sharded with the columns, B is whole. Whole parts have the same gradient on every rank, without further communication.
"""

# R rank, I in_features, O out_features

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from plop_dist.errors import PlacementError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import sizes_of
from plop_dist.training.adapters.shards import AdapterShard, gather_lengths
from plop_dist.values.placement import Placement


class TensorParallelLoRA(nn.Module):
    """A frozen AutoTP linear with its adapter added: y = base(x) + scaling * B A dropout(x).

    kind: `column` (x whole, output local), `row` (x local, output whole) or `replicated`. sizes: the shard lengths of
    the sharded feature dimension, in the order of the group's ranks. The adapter's values are not set.
    """

    def __init__(
        self, base: nn.Module, fqn: str, kind: str, sizes: tuple[int, ...], group: dist.ProcessGroup, *,
        rank: int, scaling: float, dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.base_layer, self.fqn, self.kind = base, fqn, kind
        self.group, self.scaling = group, scaling
        self.sizes: tuple[int, ...] = sizes
        self.dropout = nn.Dropout(dropout)
        weight_OI = _weight_of(base)
        local_out, local_in = weight_OI.shape
        self.lora_A = nn.Parameter(torch.empty(rank, local_in, device=weight_OI.device))
        self.lora_B = nn.Parameter(torch.empty(local_out, rank, device=weight_OI.device))
        mark_sharded(self.lora_A, kind == "row")
        mark_sharded(self.lora_B, kind == "column")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output, same shape and dtype, with the adapter's part added."""
        y = self.base_layer(x, *args, **kwargs)
        h = linear(self._dropped(x).to(self.lora_A.dtype), self.lora_A)
        if self.kind == "row":
            h = _ReduceFrom.apply(h, self.group)
        elif self.kind == "column":
            h = _CopyTo.apply(h, self.group)
        return y + (linear(h, self.lora_B) * self.scaling).to(y.dtype)

    def shard(self) -> AdapterShard:
        """Return this rank's adapter parameters with their layout."""
        A_dim, B_dim = (1 if self.kind == "row" else None), (0 if self.kind == "column" else None)
        return AdapterShard(self.fqn, self.lora_A, self.lora_B, A_dim, B_dim, self.sizes, self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        if self.kind != "row" or not self.training or self.dropout.p == 0:
            return self.dropout(x)
        # Drawn for the whole width: shards may differ in theirs, and ranks that draw unequally often drift apart.
        mask = self.dropout(x.new_ones(*x.shape[:-1], sum(self.sizes)))
        return x * mask.split(self.sizes, dim=-1)[dist.get_rank(self.group)]


def mark_sharded(parameter: nn.Parameter, is_sharded: bool) -> None:
    """Tell DeepSpeed, which otherwise counts the parameter on one rank alone when it clips gradients."""
    parameter.tensor_model_parallel = is_sharded  # pyright: ignore[reportAttributeAccessIssue]  # a mark of Megatron's


def add_adapters(
    model: nn.Module, placement: Placement, peft_config: Any, group: dist.ProcessGroup, *, seed: int
) -> list[AdapterShard]:
    """Wrap the chosen modules of a model that AutoTP has sharded over `group`, freeze the rest, return the adapters.

    They are set to the initial ones. Collective over `group`. Raises PlacementError for a module that is absent or of a
    kind whose shards are not rows or columns of one weight.
    """
    adapter_sizes = sizes_of(placement, peft_config)
    bases = {fqn: _base(model, fqn) for fqn in adapter_sizes}
    kinds = {fqn: _kind(base, fqn) for fqn, base in bases.items()}
    lengths = [_weight_of(base).shape[1 if kinds[fqn] == "row" else 0] for fqn, base in bases.items()]
    model.requires_grad_(False)
    shards = []
    for (fqn, base), sizes in zip(bases.items(), gather_lengths(lengths, group), strict=True):
        rank, scaling = adapter_sizes[fqn]
        wrapped = TensorParallelLoRA(
            base, fqn, kinds[fqn], sizes, group, rank=rank, scaling=scaling, dropout=peft_config.lora_dropout
        )
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
        shards.append(wrapped.shard())
    set_initial(shards, seed)
    return shards


def added_shards(model: nn.Module) -> list[AdapterShard]:
    """Return the adapters that add_adapters has put into a model."""
    return [module.shard() for module in model.modules() if isinstance(module, TensorParallelLoRA)]


def _base(model: nn.Module, fqn: str) -> nn.Module:
    try:
        return model.get_submodule(fqn)
    except AttributeError:
        raise PlacementError(f"The model has no module '{fqn}'; score and place this model again.") from None


def _kind(base: nn.Module, fqn: str) -> str:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    # Subclasses shard blocks of fused weights: there a shard is not one run of rows.
    kind = {LinearLayer: "column", LinearAllreduce: "row", nn.Linear: "replicated"}.get(type(base))
    if kind is None:
        raise PlacementError(
            f"'{fqn}' is a {type(base).__name__}, whose adapter cannot be sharded with AutoTP; exclude it with "
            "placement.exclude, or train with parallel.backend=megatron."
        )
    return kind


def _weight_of(base: nn.Module) -> Tensor:
    return base.get_parameter("weight")


class _CopyTo(torch.autograd.Function):
    """Identity forward; the gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    """Sum over the group forward; the gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
