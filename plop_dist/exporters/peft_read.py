"""What a PEFT configuration adapts in the scored model, and what of it is not counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from plop_dist.exporters.adapter_config import check_adapter_config
from plop_dist.exporters.exporter import Adapted
from plop_dist.exporters.holders import known_projections
from plop_dist.exporters.peft_match import adapted_ranks
from plop_dist.exporters.suffixes import suffixes
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection

# Fields by which PEFT trains more than A and B: whole modules, DoRA's magnitudes, biases, rows of embeddings.
_TRAIN_MORE = ("modules_to_save", "use_dora", "bias", "lora_bias", "trainable_token_indices", "layer_replication")


def adapted_by_peft(config: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
    """Return what PEFT makes of a configuration: names, regex, "all-linear", excludes, layers, parameters, patterns.

    where: the file, for messages. Raises ConfigError if it is no LoRA configuration, one that PEFT refuses for this
    model, or one whose patterns cannot be matched in a few seconds.
    """
    check_adapter_config(config, where)
    known = known_projections(placement)
    model_type = (placement.source.model.model_extra or {}).get("model_type")
    ranks = adapted_ranks(config, known, model_type, where)
    return Adapted(
        ranks={item.fqn: ranks[item.holder] for item in known if item.holder in ranks},
        rank=int(config.get("r", 8)),
        unmatched=_unmatched(config, known),
        uncounted=tuple(name for name in _TRAIN_MORE if config.get(name) not in (None, False, "none", [], {})),
    )


def _unmatched(config: Mapping[str, Any], known: Iterable[Projection]) -> tuple[str, ...]:
    targets = config.get("target_modules") or ()
    names = [] if isinstance(targets, str) else list(targets)
    names += config.get("target_parameters") or ()
    matched = set()
    for item in known:
        matched.update(suffixes(item.holder))
        matched.update(suffixes(f"{item.holder}.weight"))
        if item.storage == "expert_parameter":
            # Configurations from transformers 4 name the experts' linears, which were modules then.
            matched.update(suffixes(item.fqn))
    return tuple(sorted(set(names) - matched))
