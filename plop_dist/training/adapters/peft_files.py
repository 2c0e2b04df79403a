"""PEFT's files from a model that holds PEFT's adapters, wrapped by PEFT or not, partitioned by ZeRO or not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from plop_dist.training.adapters.saved import write_config, write_weights

_PREFIX = "base_model.model."


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """Return the first adapter's tensors, whole, on the CPU, under PEFT's names in files. Collective at ZeRO-3."""
    from peft import get_peft_model_state_dict

    name = next(iter(model.peft_config))
    held = {path: parameter for path, parameter in model.named_parameters() if f".{name}" in path}
    with _gathered(list(held.values())):
        whole = {path: parameter.detach().cpu().clone() for path, parameter in held.items()}
    state = get_peft_model_state_dict(model, state_dict=whole, adapter_name=name, save_embedding_layers=False)
    return {_as_peft(path): tensor.contiguous() for path, tensor in state.items()}


def write_peft(directory: Path, tensors: Mapping[str, Tensor], model: Any) -> None:
    """Write the weights and the configuration. Raises RunDirError."""
    write_weights(directory, tensors)
    peft_config = next(iter(model.peft_config.values()))
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    write_config(directory, peft_config, peft_config.base_model_name_or_path or own)


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _as_peft(path: str) -> str:
    return path if path.startswith(_PREFIX) else _PREFIX + path
