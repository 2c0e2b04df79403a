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

    Of copies the first is sent: that of replica 0, and of the first rank in a shard's group. One adapter at a time is
    whole in memory besides rank 0's collection of adapters; the base model is not touched. Collective over all ranks.
    """
    whole = {}
    for shard in shards:
        A_RI, B_OR = shard.gather(shard.A, shard.B)
        if dp_rank == 0 and (shard.group is None or dist.get_rank(shard.group) == 0):
            whole[shard.fqn] = (A_RI, B_OR)
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
    tensors = {}
    for fqn in sorted(adapters, key=natural_key):
        for name, tensor in zip("AB", adapters[fqn], strict=True):
            tensors[f"base_model.model.{fqn}.lora_{name}.weight"] = tensor.contiguous()
    write_weights(directory, tensors)
    write_config(directory, lora_config(placement, config), config.stored()["model"]["name_or_path"])
    if dist.is_initialized():
        dist.barrier()


def write_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's tensors under PEFT's names. Raises RunDirError."""
    from safetensors.torch import save

    write_bytes(directory / WEIGHTS, save(dict(tensors), {"format": "pt"}))


def write_config(directory: Path, peft_config: Any, base: str | None) -> None:
    """Write adapter_config.json, for use with the model `base` and not for training on."""
    written = copy.copy(peft_config)
    written.inference_mode, written.base_model_name_or_path = True, base
    written.save_pretrained(str(directory))
