"""Placement -> peft.LoraConfig: adapter_config.json, and the object itself.

PEFT matches a list of target_modules by equality or dotted suffix; fused 3-D experts are reached by target_parameters
alone. Ranks that differ go into rank_pattern, with alpha_pattern holding alpha / rank at the placement's value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import Targets, hugging_face_targets
from plop_dist.exporters.peft_read import adapted_by_peft
from plop_dist.exporters.refusals import PART, UNFIT, check_engine
from plop_dist.exporters.serving import serving_warnings
from plop_dist.exporters.suffixes import shortest_names_of
from plop_dist.exporters.task_type import task_type
from plop_dist.exporters.text import number, python_arguments
from plop_dist.values.placement import Export, Placement

FILE = "adapter_config.json"
MATCHING = "as in PEFT, a path that is equal to it or ends with a dot and it"


class Peft:
    """PEFT's LoRA configuration."""

    name = "peft"
    summary = "PEFT's adapter_config.json, and the LoraConfig call"
    engines = ("peft",)
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "rank_pattern",
            "alpha_pattern", "fan_in_fan_out", "bias", "inference_mode", "peft_type", "task_type",
            "base_model_name_or_path")  # fmt: skip
    matching = MATCHING
    limits = (PART, UNFIT)
    flags_in: Language = "python"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return adapter_config.json and the LoraConfig call, with what servers would not apply as warnings.

        Raises ExportError for a part of a fused linear.
        """
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        fields = lora_config_fields(placement, targets)
        tree = {
            "peft_type": "LORA",
            "task_type": task_type(placement.source.model),
            "base_model_name_or_path": placement.source.model.name_or_path,
            "bias": "none",
            "inference_mode": False,
            **fields,
        }
        given = {"task_type": tree["task_type"], **fields}
        arguments = {name: value for name, value in given.items() if value not in ({}, None, False)}
        return Export(
            target=self.name,
            files={FILE: json.dumps(tree, indent=2) + "\n"},
            flags=(f"LoraConfig({python_arguments(arguments)})",),
            notes=(*targets.notes, *count_note(placement, targets)),
            widened=targets.widened,
            warnings=serving_warnings(targets, placement.rank),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what an adapter_config.json adapts, as PEFT reads it."""
        return adapted_by_peft(fields, placement, where)

    def to_config(self, placement: Placement, *, widen: bool = False, **options: Any) -> Any:
        """Return a peft.LoraConfig adapting exactly the placement; `options` override its fields (r, lora_alpha, ...).

        With `r` or `lora_alpha` given, ranks in rank_pattern stay and their alphas follow the new ratio.
        Raises ExportError when PEFT cannot adapt exactly these modules and `widen` is false.
        """
        from peft import LoraConfig

        resized = placement.model_copy(
            update={"rank": options.get("r", placement.rank), "alpha": options.get("lora_alpha", placement.alpha)}
        ).with_source(placement.source)
        fields = lora_config_fields(resized, hugging_face_targets(resized, self.name, widen))
        return LoraConfig(**{"task_type": task_type(placement.source.model), **fields, **options})


EXPORTER = Peft()


def lora_config_fields(placement: Placement, targets: Targets) -> dict[str, Any]:
    """Return LoraConfig's fields that depend on the placement."""
    ranks, alphas = rank_patterns(placement, targets)
    # PEFT corrects this per module, with a warning each time it is wrong.
    has_conv1d = any(module.storage == "conv1d" for module in placement.source.modules)
    return {
        "r": placement.rank,
        "lora_alpha": number(placement.alpha),
        "lora_dropout": 0.0,
        "target_modules": list(targets.modules),
        "target_parameters": list(targets.parameters) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": has_conv1d,
    }


def rank_patterns(placement: Placement, targets: Targets) -> tuple[dict[str, int], dict[str, float]]:
    """Return PEFT's rank_pattern and alpha_pattern: regexes that PEFT matches against the end of a path."""
    by_rank: dict[int, list[str]] = {}
    for holder in targets.holders:
        by_rank.setdefault(holder.rank, []).append(holder.peft_path)
    paths = {holder.peft_path for holder in targets.holders}
    ranks: dict[str, int] = {}
    for rank, names in shortest_names_of(by_rank, sorted(by_rank.keys() - {placement.rank})).items():
        for name in names:
            # PEFT lets any prefix stand before a pattern: a full path says that it begins there.
            ranks[f"^{re.escape(name)}" if name in paths else re.escape(name)] = rank
    alphas = {name: number(placement.alpha * rank / placement.rank) for name, rank in ranks.items()}
    return ranks, alphas
