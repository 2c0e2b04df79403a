"""Placement -> Axolotl's YAML: lora_target_modules, lora_r, lora_alpha, lora_rank_pattern (PEFT underneath)."""

from __future__ import annotations

from typing import Any

from plop_dist.exporters.peft import count_note, rank_patterns
from plop_dist.exporters.targets import check_engine, hugging_face_targets, whole_number
from plop_dist.exporters.text import yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the YAML section; its lines are the flags. Raises ExportError for a part of a fused linear."""
    check_engine(engine, ("axolotl",), "axolotl")
    targets = hugging_face_targets(placement, "axolotl", widen)
    fields: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": placement.rank,
        "lora_alpha": whole_number(placement.alpha, "axolotl"),
        "lora_dropout": 0.0,
        "lora_target_modules": list(targets.modules),
    }
    if targets.parameters:
        fields["lora_target_parameters"] = list(targets.parameters)
    ranks, alphas = rank_patterns(placement, targets)
    if ranks:
        fields["lora_rank_pattern"] = ranks
        fields["lora_alpha_pattern"] = {name: whole_number(alpha, "axolotl") for name, alpha in alphas.items()}
    text = yaml_text(fields)
    return Export(
        target="axolotl",
        files={"axolotl.yaml": text},
        flags=tuple(text.splitlines()),
        notes=(*targets.notes, *count_note(placement, targets)),
        widened=targets.widened,
    )
