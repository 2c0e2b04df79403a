"""The adapters of a host's model as PEFT's files, out of whatever layout holds them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from plop_dist.errors import ModelError
from plop_dist.plugin.apply import unwrapped
from plop_dist.training.adapters.saved import write_weights

_PREFIX = "base_model.model."


def save_adapter(model: Any, folder: str | Path) -> Path:
    """Write adapter_model.safetensors and adapter_config.json, from rank 0, and return the folder.

    model: what placement.apply returned, or what a host has made of PEFT's model itself: in DDP, in a DeepSpeed engine
    of any ZeRO stage, under fully_shard. Collective over the world; all ranks return when the files are there.
    Raises ModelError for a model without adapters, RunDirError where the folder cannot be written.
    """
    inner = unwrapped(model)
    if not isinstance(getattr(inner, "peft_config", None), Mapping):
        raise ModelError(
            f"save_adapter() got a {type(inner).__name__} without adapters of PEFT; pass what placement.apply() "
            "returned."
        )
    from peft import get_peft_model_state_dict

    name, peft_config = next(iter(inner.peft_config.items()))
    trained = {path: parameter for path, parameter in inner.named_parameters() if f".{name}" in path}
    with _gathered(list(trained.values())):
        whole = {path: parameter.detach().cpu().clone() for path, parameter in trained.items()}
    directory = Path(folder)
    if _rank() == 0:
        state = get_peft_model_state_dict(inner, state_dict=whole, adapter_name=name, save_embedding_layers=False)
        write_weights(directory, {_as_peft(path): tensor.contiguous() for path, tensor in state.items()})
        _write_config(directory, peft_config, inner)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return directory


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _as_peft(path: str) -> str:
    return path if path.startswith(_PREFIX) else _PREFIX + path


def _write_config(directory: Path, peft_config: Any, inner: Any) -> None:
    base = peft_config.base_model_name_or_path or getattr(getattr(inner, "config", None), "_name_or_path", None)
    kept = peft_config.inference_mode, peft_config.base_model_name_or_path
    peft_config.inference_mode, peft_config.base_model_name_or_path = True, base
    try:
        peft_config.save_pretrained(str(directory))
    finally:
        peft_config.inference_mode, peft_config.base_model_name_or_path = kept


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
