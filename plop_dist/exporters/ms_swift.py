"""Placement -> ms-swift's flags and YAML: --target_modules, --lora_rank, --lora_alpha (PEFT underneath)."""

from __future__ import annotations

from typing import Any

from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import check_engine, hugging_face_targets, uniform_rank, whole_number
from plop_dist.exporters.text import shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the flags and a --config file. Raises ExportError for ranks that differ or a part of a fused linear."""
    check_engine(engine, ("ms-swift",), "ms-swift")
    targets = hugging_face_targets(placement, "ms-swift", widen)
    rank, alpha, widened = uniform_rank(targets, placement, "ms-swift", widen)
    fields: dict[str, Any] = {
        "tuner_type": "lora",
        "lora_rank": rank,
        "lora_alpha": whole_number(alpha, "ms-swift"),
        "target_modules": list(targets.modules),
    }
    if targets.parameters:
        fields["target_parameters"] = list(targets.parameters)
        fields["lora_dropout"] = 0.0  # its default is 0.05, which PEFT refuses on parameters
    if not targets.modules:
        # An empty list cannot be typed, and without one ms-swift adapts all linears: a regex that nothing matches.
        del fields["target_modules"]
        fields["target_regex"] = "(?!)"
    return Export(
        target="ms-swift",
        files={"ms_swift.yaml": yaml_text(fields)},
        flags=shell_flags(fields),
        notes=(
            *targets.notes,
            *count_note(placement, targets),
            "ms-swift 3 calls tuner_type train_type.",
        ),
        widened=(*targets.widened, *widened),
    )
