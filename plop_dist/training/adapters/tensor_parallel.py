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

from plop_dist.config.schema import TrainConfig
from plop_dist.errors import PlacementError
from plop_dist.training.adapters.initial import initial_adapter
from plop_dist.training.adapters.shards import AdapterShard, ranks_of, scaling_of
from plop_dist.values.placement import Placement


class TensorParallelLoRA(nn.Module):
    """A frozen AutoTP linear with its adapter added: y = base(x) + scaling * B A dropout(x).

    kind: `column` (x whole, output local), `row` (x local, output whole) or `replicated`. sizes: the shard lengths of
    the sharded feature dimension, in the order of the group's ranks.
    """

    def __init__(
        self, base: nn.Module, fqn: str, kind: str, sizes: tuple[int, ...], group: dist.ProcessGroup | None, *,
        rank: int, scaling: float, dropout: float, seed: int,
    ):  # fmt: skip
        super().__init__()
        self.base_layer, self.fqn, self.kind = base, fqn, kind
        self.sizes, self.group, self.scaling = sizes, group, scaling
        self.dropout = nn.Dropout(dropout)
        local_out, local_in = base.weight.shape
        in_features = sum(sizes) if kind == "row" else local_in
        out_features = sum(sizes) if kind == "column" else local_out
        A, B = initial_adapter(fqn, in_features, out_features, rank, seed)
        own = dist.get_rank(group) if kind != "replicated" else 0
        self.lora_A = self._parameter(A.split(sizes, dim=1)[own] if kind == "row" else A, kind == "row")
        self.lora_B = self._parameter(B.split(sizes, dim=0)[own] if kind == "column" else B, kind == "column")

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

    def _parameter(self, value: Tensor, is_sharded: bool) -> nn.Parameter:
        parameter = nn.Parameter(value.to(self.base_layer.weight.device, copy=True).contiguous())
        # DeepSpeed counts unmarked parameters once per tensor-parallel group when it clips gradients.
        parameter.tensor_model_parallel = is_sharded  # type: ignore[attr-defined]
        return parameter


def add_adapters(model: nn.Module, placement: Placement, train: TrainConfig) -> list[AdapterShard]:
    """Wrap the chosen modules of a model that AutoTP has sharded, freeze the rest, and return the adapters.

    Raises PlacementError for a module that is absent or of a kind whose shards are not rows or columns of one weight.
    """
    model.requires_grad_(False)
    shards = []
    for fqn, rank in ranks_of(placement).items():
        try:
            base = model.get_submodule(fqn)
        except AttributeError:
            raise PlacementError(f"The model has no module '{fqn}'; score and place this model again.") from None
        kind, sizes, group = _layout(base, fqn)
        wrapped = TensorParallelLoRA(
            base, fqn, kind, sizes, group, rank=rank, scaling=scaling_of(placement),
            dropout=train.lora_dropout, seed=train.seed,
        )  # fmt: skip
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
        shards.append(wrapped.shard())
    return shards


def _layout(base: nn.Module, fqn: str) -> tuple[str, tuple[int, ...], dist.ProcessGroup | None]:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    # Subclasses shard blocks of fused weights: there a shard is not one run of rows.
    kind = {LinearLayer: "column", LinearAllreduce: "row", nn.Linear: "replicated"}.get(type(base))
    if kind is None:
        raise PlacementError(
            f"'{fqn}' is a {type(base).__name__}, whose adapter cannot be sharded with AutoTP; exclude it with "
            "placement.exclude, or train with parallel.backend=megatron."
        )
    if kind == "replicated":
        return kind, (), None
    group, axis = base.mp_group, 0 if kind == "column" else 1
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, base.weight.shape[axis], group=group)
    return kind, tuple(sizes), group


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
