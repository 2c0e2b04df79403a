"""Where accelerate puts the modules of a model that may be larger than the memory, and what a pass reads of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plop_dist.backends.hf.silence import unheard
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError


@dataclass(frozen=True)
class Placing:
    """What lies where, in bytes of the dtype that is loaded: of each device, on disk, and the largest single module."""

    by_device: dict[str, int]
    disk: int
    largest: int

    @property
    def resident(self) -> int:
        """The most that is in memory at once: what stays, and a module that is brought."""
        return sum(self.by_device.values()) + (self.largest if self.disk else 0)


def is_placed(model: ModelConfig) -> bool:
    """Tell whether accelerate says where each weight is kept."""
    return model.device_map is not None or model.max_memory is not None


def placing_options(model: ModelConfig) -> dict[str, Any]:
    """Return what from_pretrained is to be told of it."""
    if not is_placed(model):
        return {}
    options = {"device_map": model.device_map or "auto", "max_memory": model.max_memory}
    return {**options, "offload_folder": model.offload_folder}


def plan_placing(model: ModelConfig, twin: nn.Module, dtype: torch.dtype) -> Placing:
    """Return where the weights will lie. twin: the model on the meta device. Raises ModelError where none stays."""
    from transformers.integrations.accelerate import _get_device_map

    options = placing_options(model)
    whole: Any = twin.to(dtype)
    whole.tie_weights()
    with unheard():
        found: dict[str, Any] = _get_device_map(whole, options["device_map"], options["max_memory"], None)
    by_device: dict[str, int] = {}
    sizes: list[int] = []
    for path, parameter in whole.named_parameters():
        size = parameter.numel() * parameter.element_size()
        sizes.append(size)
        device = _device_of(path, found)
        by_device[device] = by_device.get(device, 0) + size
    disk = by_device.pop("disk", 0)
    if not by_device:
        raise ModelError(
            f"model.max_memory {model.max_memory} leaves all of '{model.name_or_path}' on disk, also what is used by "
            f"itself (embeddings); give the cpu more: at least these and a layer, {sum(sizes) / 1e6:.0f} MB are all."
        )
    return Placing(by_device, disk, max(sizes))


def check_placed(model: ModelConfig, loaded: Any, quantization: str | None) -> None:
    """Raise ModelError for weights that are spread over several accelerators, or quantised and away."""
    devices = set(map(str, (getattr(loaded, "hf_device_map", None) or {}).values())) - {"cpu", "disk"}
    if len(devices) > 1:
        raise ModelError(
            f"model.device_map '{model.device_map or 'auto'}' spreads the model over {len(devices)} devices "
            f"({', '.join(sorted(devices))}); let it use one beside cpu and disk (model.max_memory), or cut the model "
            "with parallel.tp or parallel.pp."
        )
    if quantization is not None and any(parameter.is_meta for parameter in loaded.parameters()):
        raise ModelError(
            f"model.device_map and model.max_memory put quantised weights of '{model.name_or_path}' on cpu or disk, "
            "from where their kernels do not take them; give it more memory, or load it unquantised."
        )


def _device_of(path: str, device_map: dict[str, Any]) -> str:
    while path and path not in device_map:
        path = path.rpartition(".")[0]
    return str(device_map.get(path, "cpu"))
