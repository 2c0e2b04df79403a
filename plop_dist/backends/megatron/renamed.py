"""What transformers calls a checkpoint's weight: Bridge goes by the names in the files, scores by those of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from plop_dist.backends.megatron.names import HFNames

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED = ("gate_proj", "up_proj")


def path_in(whole: nn.Module) -> Callable[[str], str]:
    """Return what gives the parameter of a model into which transformers loads a stored weight."""
    from transformers.core_model_loading import rename_source_key

    model: Any = whole
    renamings, converters = _transforms(model)
    places, prefix = model.state_dict(), model.base_model_prefix
    return lambda name: rename_source_key(name, renamings, converters, prefix, places)[0]


def as_modules(names: HFNames, whole: nn.Module, known: Collection[str]) -> HFNames:
    """Return the names with every path that the model does not have renamed as transformers does when it loads.

    whole: the Hugging Face model, on the meta device. known: its projections' paths.
    """
    renamings, converters = _transforms(whole)

    def rename(name: str) -> str:
        if name.removesuffix(".weight") in known:
            return name
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return _one_of_experts(name, target, list(converter.source_patterns).index(pattern))
        return name

    def look_up(parameter: str) -> Mapping[str, str] | None:
        found = names(parameter)
        return found and {part: rename(name) for part, name in found.items()}

    return look_up


def _transforms(whole: Any) -> tuple[list[Any], list[Any]]:
    """Return what transformers does to stored names: renamings, and converters, which also join weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(whole)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def _one_of_experts(name: str, target: str, place: int) -> str:
    """Return the path of one expert's weight that is joined into `target`, a 3-D parameter; any other keeps its own.

    place: of the weight among those that are joined; of two, the gate comes first.
    """
    number, (owner, _, leaf) = _EXPERT.search(name), target.rpartition(".")
    if number is None or not owner.endswith(".experts"):
        return name
    return f"{owner}.{number.group(1)}.{_FUSED[place] if leaf == 'gate_up_proj' else leaf}.weight"
