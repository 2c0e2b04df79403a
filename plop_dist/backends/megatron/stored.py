"""Whether every weight of a Hugging Face checkpoint goes into the model that Bridge built, and all of it is filled.

Bridge only warns about parameters without weights, and says nothing of weights that it does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from plop_dist.backends.megatron.checks import gather_set
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.language import is_of_language, language_model, language_path
from plop_dist.backends.megatron.renamed import path_in
from plop_dist.config.schema import Config
from plop_dist.errors import ModelError

_ELSEWHERE = "Use parallel.backend=deepspeed or transformers for it."


def check_weights(bridge: Any, chunks: Sequence[nn.Module], whole: nn.Module, config: Config) -> None:
    """Raise ModelError, on every rank, if any parameter would be left random, or any weight unread. Collective.

    whole: the Hugging Face model, on the meta device; what it has no place for either is not missed.
    """
    tasks = bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, list(chunks))
    _check_filled(tasks, chunks, config)
    _check_read(bridge, tasks, whole, config)


def _check_filled(tasks: Sequence[Any], chunks: Sequence[nn.Module], config: Config) -> None:
    filled = {id(task.param_weight) for task in tasks if task is not None}
    names = [
        name
        for chunk in chunks
        for name, parameter in unwrap(chunk).named_parameters()
        if id(parameter) not in filled | _unused(chunk)
        # The last stage's copy of tied embeddings is filled from the first one's.
        and not (name.endswith("output_layer.weight") and language_model(chunk).share_embeddings_and_output_weights)
    ]
    missing = sorted(gather_set(names))
    if missing:
        raise ModelError(
            f"model.name_or_path '{config.model.name_or_path}': Megatron-Bridge finds no weights for {len(missing)} of "
            f"Megatron's parameters, e.g. '{missing[0]}'; they would be random. {_ELSEWHERE}"
        )


def _unused(chunk: nn.Module) -> set[int]:
    """Return the ids of a chunk's parameters that its forward never reads: norms of keys that are another layer's."""
    shared: list[Any] = [module for module in chunk.modules() if getattr(module, "is_kv_shared_layer", False)]
    return {id(parameter) for attention in shared for parameter in attention.k_layernorm.parameters()}


def _check_read(bridge: Any, tasks: Sequence[Any], whole: Any, config: Config) -> None:
    read: set[str] = set()
    for task in tasks:
        if task is not None:
            names = task.mapping.hf_param
            read.update(names.values() if isinstance(names, dict) else [names])
    read = gather_set(read)
    # A tied head may be stored beside the embedding that stands for it.
    has_place = set(whole.state_dict()) - set(whole.all_tied_weights_keys)
    if language_path(whole):
        has_place = {name for name in has_place if is_of_language(name, whole)}
    find = path_in(whole)
    unread = sorted(name for name in bridge.hf_pretrained.state if name not in read and find(name) in has_place)
    if unread:
        raise ModelError(
            f"model.name_or_path '{config.model.name_or_path}': Megatron-Bridge leaves out {len(unread)} of "
            f"the checkpoint's weights, e.g. '{unread[0]}'. {_ELSEWHERE}"
        )
