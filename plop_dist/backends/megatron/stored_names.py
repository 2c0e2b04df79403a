"""A checkpoint's weights under the names that Megatron-Bridge asks for, where transformers has saved them under others.

Bridge knows the names of the hub. What transformers loads from there and saves anew may have others, all of which
transformers reads as the same parameter (Nemotron-H: `backbone.embeddings` and `backbone.embedding`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from plop_dist.backends.megatron.renamed import path_in


def offer_known_names(bridge: Any, whole: nn.Module) -> None:
    """Have the bridge find weights whose stored names it does not know, under those it does. Reads names alone.

    whole: the Hugging Face model, on the meta device.
    """
    source = bridge.hf_pretrained.state.source
    stored: list[str] = source.get_all_keys()
    alias = _aliases(stored, _patterns(bridge), whole)
    if not alias:
        return
    asked = {name: known for known, name in alias.items()}
    keys = sorted(asked.get(name, name) for name in stored)
    load = source.load_tensors

    def load_tensors(names: list[str]) -> dict[str, Any]:
        loaded: dict[str, Any] = load([alias.get(name, name) for name in names])
        return {asked.get(name, name): tensor for name, tensor in loaded.items()}

    source.get_all_keys, source.load_tensors = lambda: keys, load_tensors


def _patterns(bridge: Any) -> set[str]:
    """Return the names that the bridge asks for, `*` for the number of a layer or expert."""
    asked: set[str] = set()
    for mapping in bridge._model_bridge.mapping_registry().get_all_mappings():
        names = mapping.hf_param
        asked.update(names.values() if isinstance(names, dict) else [names])
    return asked


def _aliases(stored: Iterable[str], patterns: set[str], whole: nn.Module) -> dict[str, str]:
    """Return known name -> stored name, for weights with a place in the model that no pattern fits."""
    find, places = path_in(whole), set(whole.state_dict())
    known = re.compile("|".join(re.escape(one).replace(r"\*\*", ".*").replace(r"\*", r"\d+") for one in patterns))
    have, alias = set(stored), {}
    for name in stored:
        if known.fullmatch(name) or find(name) not in places:
            continue
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        fitting = (one for one in patterns if one.count("*") == len(numbers) and "**" not in one)
        for pattern in sorted(fitting):
            asked = _filled(pattern, numbers)
            if asked not in have and find(asked) == find(name):
                alias[asked] = name
                break
    return alias


def _filled(pattern: str, numbers: list[str]) -> str:
    left = iter(numbers)
    return re.sub(r"\*", lambda _: next(left), pattern)
