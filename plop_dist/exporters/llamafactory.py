"""Placement -> LLaMA-Factory's YAML and overrides: lora_target (a comma list), lora_rank, lora_alpha."""

from __future__ import annotations

from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import (
    check_engine,
    hugging_face_targets,
    refuse_parameters,
    uniform_rank,
    whole_number,
)
from plop_dist.exporters.text import yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the YAML section, and the overrides for `llamafactory-cli train`.

    Raises ExportError for ranks that differ, a part of a fused linear, or experts kept as 3-D parameters.
    """
    check_engine(engine, ("llamafactory",), "llamafactory")
    targets = hugging_face_targets(placement, "llamafactory", widen)
    refuse_parameters(targets, "llamafactory")
    rank, alpha, widened = uniform_rank(targets, placement, "llamafactory", widen)
    fields = {
        "finetuning_type": "lora",
        "lora_rank": rank,
        "lora_alpha": whole_number(alpha, "llamafactory"),
        "lora_target": ",".join(targets.modules),
    }
    return Export(
        target="llamafactory",
        files={"llamafactory.yaml": yaml_text(fields)},
        # Parsed by OmegaConf's dot list, where commas need no quotes.
        flags=tuple(f"{name}={value}" for name, value in fields.items()),
        notes=(*targets.notes, *count_note(placement, targets)),
        widened=(*targets.widened, *widened),
    )
