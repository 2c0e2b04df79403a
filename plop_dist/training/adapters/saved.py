"""How a trained adapter is written: as PEFT reads it, by rank 0, whatever layout it was trained in."""

# R rank, I in_features, O out_features

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from plop_dist.config.schema import Config
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.values.files import write_bytes
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement

WEIGHTS = "adapter_model.safetensors"


def save_peft_adapter(
    directory: Path, shards: Sequence[AdapterShard], placement: Placement, config: Config, *, dp_rank: int
) -> None:
    """Write the adapter that the ranks hold in shards, from rank 0.

    Of copies the first is sent: that of replica 0, and of the first rank in a shard's group. The base model is not
    touched. Collective over all ranks.
    """
    tensors = gather_tensors(whole_tensors(shards) if dp_rank == 0 else {})
    if tensors is not None:
        check_complete(_adapted(tensors), placement)
        write_weights(directory, tensors)
        write_config(directory, lora_config(placement, config), config.stored()["model"]["name_or_path"])
    if dist.is_initialized():
        dist.barrier()


def whole_tensors(shards: Sequence[AdapterShard]) -> dict[str, Tensor]:
    """Return this rank's adapters whole, on the CPU, under PEFT's names, from the first rank of each shard's group.

    Collective over the shards' groups.
    """
    tensors = {}
    for shard in shards:
        pair = shard.gather(shard.A, shard.B)
        if shard.group is None or dist.get_rank(shard.group) == 0:
            for name, tensor in zip("AB", pair, strict=True):
                tensors[f"base_model.model.{shard.fqn}.lora_{name}.weight"] = tensor.contiguous()
    return tensors


def gather_tensors(own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return all ranks' tensors on rank 0, in natural order, None elsewhere. Collective over the world.

    Of copies that of the first rank is sent.
    """
    if not dist.is_initialized():
        return {name: own[name] for name in sorted(own, key=natural_key)}
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, sorted(own))
    before = {name for names in held[: dist.get_rank()] for name in names}
    parts: list[Any] | None = [None] * len(held) if dist.get_rank() == 0 else None
    dist.gather_object({name: own[name] for name in own if name not in before}, parts, dst=0)
    if parts is None:
        return None
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: tensors[name] for name in sorted(tensors, key=natural_key)}


def _adapted(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}


def write_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's tensors under PEFT's names. Raises RunDirError."""
    from safetensors.torch import save

    write_bytes(directory / WEIGHTS, save(dict(tensors), {"format": "pt"}))


def write_config(directory: Path, peft_config: Any, base: str | None) -> None:
    """Write adapter_config.json, for use with the model `base` and not for training on."""
    written = copy.copy(peft_config)
    written.inference_mode, written.base_model_name_or_path = True, base
    written.save_pretrained(str(directory))
