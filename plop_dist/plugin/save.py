"""The adapters of a host's model as PEFT's files, out of whatever layout holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from plop_dist.errors import ModelError, RunDirError
from plop_dist.plugin.apply import unwrapped
from plop_dist.plugin.detect import find
from plop_dist.registry import HOST_LAYOUTS, load
from plop_dist.training.adapters.peft_files import write_peft


def save_adapter(model: Any, folder: str | Path) -> Path:
    """Write adapter_model.safetensors and adapter_config.json, from rank 0, and return the folder.

    model: what placement.apply returned, or what a host has made of PEFT's model itself: in DDP, in a DeepSpeed engine
    of any ZeRO stage, under fully_shard. Parts that lie on several ranks are joined. Collective over the world; all
    ranks return when the files are there.
    Raises ModelError for a model without adapters, LayoutError for sharding that is not known, RunDirError where the
    folder cannot be written.
    """
    layout = find(model).wrapper
    inner = unwrapped(model)
    if not isinstance(getattr(inner, "peft_config", None), Mapping):
        raise ModelError(
            f"save_adapter() got a {type(inner).__name__} without adapters of PEFT; pass what placement.apply() "
            "returned."
        )
    directory = Path(folder)
    tensors = load(HOST_LAYOUTS, layout).tensors(model, inner)
    if not (dist.is_available() and dist.is_initialized()):
        write_peft(directory, tensors or {}, inner)
        return directory
    said: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write_peft(directory, tensors or {}, inner)
        except RunDirError as error:
            said = [str(error)]
    dist.broadcast_object_list(said, src=0)  # the others wait for the files, and hear of an error
    if said[0] is not None:
        raise RunDirError(said[0])
    return directory
