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
    from transformers.utils.peft_utils import find_adapter_config_file

    _let_kernels(model.trust_remote_code)
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


def _let_kernels(is_trusted: bool) -> None:
    """Have transformers fetch kernels from a hub, or take the package that does it for absent."""
    from transformers.integrations import hub_kernels
    from transformers.utils.import_utils import is_kernels_available

    # What transformers 5.12 and what 5.24 asks before it fetches one.
    flags: Any = hub_kernels
    flags._kernels_available = is_trusted and is_kernels_available()
    flags.is_kernels_available = is_kernels_available if is_trusted else lambda: False
    if is_kernels_available():  # and what it calls in the end, wherever that is asked for
        import kernels

        own = getattr(kernels.get_kernel, "own", kernels.get_kernel)
        kernels.get_kernel = flags.get_kernel_hub = own if is_trusted else _Refusal(own)


class _Refusal:
    """Stands for the function that fetches a kernel; own: that function."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        raise FileNotFoundError(f"the kernel '{name}' is not fetched: model.trust_remote_code is false")


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
