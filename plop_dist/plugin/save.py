"""The adapters of a host's model as PEFT's files, out of whatever layout holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plop_dist import ranks
from plop_dist.errors import ModelError
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
    ranks.let_gloo_end()
    layout = find(model).wrapper
    inner = unwrapped(model)
    if not isinstance(getattr(inner, "peft_config", None), Mapping):
        raise ModelError(
            f"save_adapter() got a {type(inner).__name__} without adapters of PEFT; pass what placement.apply() "
            "returned."
        )
    directory = Path(folder)
    tensors = load(HOST_LAYOUTS, layout).tensors(model, inner)
    ranks.agree(lambda: write_peft(directory, tensors or {}, inner))
    return directory
