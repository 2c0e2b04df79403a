"""The adapters of one rank, under logical names: how they are gathered whole and saved in PEFT's format."""

# R rank, I in_features, O out_features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.values.files import write_bytes
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement


@dataclass(frozen=True)
class AdapterShard:
    """This rank's part of one adapter: delta W = scaling * B A.

    A: (R, I) or its shard along A_dim; B: (O, R) or its shard along B_dim; None: whole, the same on every rank of
    `group`. sizes: the lengths of the shards along the sharded feature dimension, in the order of the group's ranks.
    """

    fqn: str
    A: Parameter
    B: Parameter
    A_dim: int | None = None
    B_dim: int | None = None
    sizes: tuple[int, ...] | None = None
    group: dist.ProcessGroup | None = None

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
        sizes = self.sizes or (local.shape[dim],) * dist.get_world_size(self.group)
        shapes = [(*local.shape[:dim], size, *local.shape[dim + 1 :]) for size in sizes]
        parts = [local.new_empty(shape) for shape in shapes]
        dist.all_gather(parts, local.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim).cpu()


def peft_shards(model: torch.nn.Module, adapter_name: str = "default") -> list[AdapterShard]:
    """Return the adapters that PEFT has put into a model, whole, by the paths of the modules that they wrap.

    model: without PeftModel around it (get_base_model()), or with adapters injected.
    """
    return [
        AdapterShard(path, module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight)
        for path, module in model.named_modules()
        if adapter_name in getattr(module, "lora_A", {})
    ]


def save_peft_adapter(
    directory: Path, shards: Sequence[AdapterShard], placement: Placement, config: Config, *, owns: bool = True
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them, from rank 0.

    owns: whether this rank sends its shards (one rank per stage and adapter does). One adapter at a time is whole in
    memory besides rank 0's collection of adapters; the base model is not touched. Collective over all ranks.
    """
    whole = {}
    for shard in shards:
        A, B = shard.gather(shard.A, shard.B)
        if owns:
            whole[shard.fqn] = (A, B)
    parts: list[Any] = [whole]
    if dist.is_initialized():
        rank = dist.get_rank()
        parts = [None] * dist.get_world_size()
        dist.gather_object(whole, parts if rank == 0 else None, dst=0)
        if rank != 0:
            dist.barrier()
            return
    adapters = {fqn: pair for part in parts for fqn, pair in part.items()}
    check_complete(adapters, placement)
    write_peft_adapter(directory, adapters, placement, config)
    if dist.is_initialized():
        dist.barrier()


def write_peft_adapter(
    directory: Path, adapters: dict[str, tuple[Tensor, Tensor]], placement: Placement, config: Config
) -> None:
    """Write whole adapters, fqn -> (A, B), as PEFT reads them. Raises RunDirError."""
    from safetensors.torch import save

    tensors = {}
    for fqn in sorted(adapters, key=natural_key):
        for name, tensor in zip("AB", adapters[fqn], strict=True):
            tensors[f"base_model.model.{fqn}.lora_{name}.weight"] = tensor.contiguous()
    write_bytes(directory / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    peft_config = lora_config(placement, config)
    peft_config.inference_mode = True
    peft_config.base_model_name_or_path = config.model.name_or_path
    peft_config.save_pretrained(str(directory))


def lora_config(placement: Placement, config: Config, *, widen: bool = False) -> Any:
    """Return the peft.LoraConfig that stands for the placement in training. Raises ExportError."""
    return placement.to_peft(lora_dropout=config.train.lora_dropout, widen=widen)


def scaling_of(placement: Placement) -> float:
    """Return alpha / rank, which every module keeps whatever its own rank is."""
    return placement.alpha / placement.rank


def ranks_of(placement: Placement) -> dict[str, int]:
    """Return the LoRA rank of every chosen module by path."""
    return {module.fqn: placement.rank_of(module) for module in placement.chosen}


def check_complete(adapted: Any, placement: Placement) -> None:
    """Raise PlacementError unless exactly the chosen modules have an adapter."""
    missing = sorted(set(placement.modules) - set(adapted), key=natural_key)
    foreign = sorted(set(adapted) - set(placement.modules), key=natural_key)
    if missing or foreign:
        what = f"'{missing[0]}' got no adapter" if missing else f"'{foreign[0]}' got one without being chosen"
        raise PlacementError(
            f"The placement has {len(placement.modules)} modules, but {len(list(adapted))} got an adapter: {what}; "
            "score and place this model again."
        )
