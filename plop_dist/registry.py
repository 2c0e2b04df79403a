"""Which backends, exporters, policies of training and reward functions exist, by name, imported only when asked for.

Each entry is `"module:attribute"`, so that naming one framework never imports another.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from plop_dist.errors import ConfigError, MissingExtraError, suggest

BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "transformers": "plop_dist.backends.transformers:TransformersBackend",
        "deepspeed": "plop_dist.backends.deepspeed:DeepSpeedBackend",
        "megatron": "plop_dist.backends.megatron:MegatronBackend",
    }
)

EXPORTERS: Mapping[str, str] = MappingProxyType(
    {
        "peft": "plop_dist.exporters.peft:export",
        "trl": "plop_dist.exporters.trl:export",
        "megatron-bridge": "plop_dist.exporters.megatron_bridge:export",
        "nemo-rl": "plop_dist.exporters.nemo_rl:export",
        "verl": "plop_dist.exporters.verl:export",
        "openrlhf": "plop_dist.exporters.openrlhf:export",
        "ms-swift": "plop_dist.exporters.ms_swift:export",
        "megatron-swift": "plop_dist.exporters.megatron_swift:export",
        "llamafactory": "plop_dist.exporters.llamafactory:export",
        "axolotl": "plop_dist.exporters.axolotl:export",
        "torchtune": "plop_dist.exporters.torchtune:export",
        "torchtitan": "plop_dist.exporters.torchtitan:export",
        "deepspeed": "plop_dist.exporters.deepspeed:export",
    }
)

TRAINERS: Mapping[str, str] = MappingProxyType(
    {
        "sft": "plop_dist.training.sft:train",
        "grpo": "plop_dist.training.grpo:train",
    }
)

# The package whose absence means that an extra was not installed, and that extra's name.
_EXTRA_OF = {
    "ray": "ray",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "plotly": "report",
    "jinja2": "report",
    "datasets": "train",
    "tensorboard": "loggers",
    "wandb": "loggers",
    "mlflow": "loggers",
}


def load(kind: str, table: Mapping[str, str], name: str) -> Any:
    """Return the object that `name` stands for in `table`, importing its module now.

    `kind` is the word for the error message ("backend", "export target"). Raises ConfigError for an unknown name
    and MissingExtraError, with the pip command, when the module needs a package that is not installed.
    """
    if name not in table:
        raise ConfigError(f"Unknown {kind} '{name}'. {suggest(name, table)}")
    module_name, attribute = table[name].split(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"{kind} '{name}'") from error


def missing_extra(error: ModuleNotFoundError, needed_by: str) -> Exception:
    """Return the MissingExtraError for an import that failed, or the error itself when no extra provides it."""
    package = (error.name or "").split(".")[0]
    extra = _EXTRA_OF.get(package)
    if extra is None:
        return error
    return MissingExtraError(
        f"{needed_by} needs the package '{package}', which is not installed: pip install 'plop-dist[{extra}]'"
    )
