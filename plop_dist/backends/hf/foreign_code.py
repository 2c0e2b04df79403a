"""What of a model would run code that comes with it, or from a hub, unless model.trust_remote_code asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError


def check_foreign_code(model: ModelConfig, name: str, hf_config: Any) -> None:
    """Raise ModelError for a kernel that the configuration has fetched from a hub, and for adapters beside the model.

    transformers needs no leave for either. It downloads and imports kernels, some of them unasked: they are switched
    off here for the whole process. It adds the adapters to what is scored, and PEFT before 0.21 imports the modules
    that their configuration names.
    name: the directory or id of the model.
    """
    from transformers.integrations import hub_kernels
    from transformers.utils.import_utils import is_kernels_available
    from transformers.utils.peft_utils import find_adapter_config_file

    hub_kernels._kernels_available = model.trust_remote_code and is_kernels_available()
    if not model.trust_remote_code:
        for kernel in filter(_is_fetched, _attention_of(hf_config)):
            raise ModelError(
                f"model.name_or_path '{model.name_or_path}': its config.json has attention computed by code from a hub "
                f"({kernel[:200]!a}); take attn_implementation out of it, or set model.trust_remote_code=true if you "
                "trust that code."
            )
    if find_adapter_config_file(name) is not None:
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' has an adapter_config.json: transformers would add its adapter "
            "to the model. Merge it (merge_and_unload, save_pretrained), or move it to a directory of its own."
        )


def _is_fetched(implementation: str) -> bool:
    return "/" in implementation


def _attention_of(hf_config: Any) -> Iterator[str]:
    """Yield the implementations of attention that a configuration and those inside it name."""
    from transformers import PreTrainedConfig

    own = getattr(hf_config, "_attn_implementation", None)
    if isinstance(own, str):
        yield own
    for value in vars(hf_config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _attention_of(value)
