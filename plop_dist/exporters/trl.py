"""Placement -> TRL's command line and YAML (ModelConfig): lora_target_modules, lora_r, lora_alpha.

TRL turns a list of one name into a string, which PEFT reads as a regex on the whole path: a single name is written as
such a regex. One LoRA rank for all modules.
"""

from __future__ import annotations

import re
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import Targets, check_engine, hugging_face_targets, uniform_rank, whole_number
from plop_dist.exporters.text import shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return TRL's flags and a --config file. Raises ExportError for ranks that differ or a part of a fused linear."""
    check_engine(engine, ("trl",), "trl")
    targets = hugging_face_targets(placement, "trl", widen)
    rank, alpha, widened = uniform_rank(targets, placement, "trl", widen)
    fields: dict[str, Any] = {
        "use_peft": True,
        "lora_r": rank,
        "lora_alpha": whole_number(alpha, "trl"),
        "lora_target_modules": _modules(targets),
        "lora_target_parameters": list(targets.parameters),
    }
    if targets.parameters:
        fields["lora_dropout"] = 0.0  # TRL's default is 0.05, which PEFT refuses on parameters
    if not targets.modules:
        # Without target_modules PEFT would add its defaults for the model; a regex that nothing matches adds none.
        fields["lora_target_modules"] = ["(?!)"]
    if not targets.parameters:
        del fields["lora_target_parameters"]
    return Export(
        target="trl",
        files={"trl.yaml": yaml_text(fields)},
        flags=shell_flags(fields),
        notes=(*targets.notes, *count_note(placement, targets)),
        widened=(*targets.widened, *widened),
    )


def _modules(targets: Targets) -> list[str]:
    if len(targets.modules) != 1:
        return list(targets.modules)
    name = targets.modules[0]
    if targets.has_experts and "." in name:
        # Beside 3-D experts PEFT cuts a regex down to its last component, so one path would become all of them.
        raise ExportError(
            f"trl would adapt every {name.rpartition('.')[2]} of this MoE model, not only {name}: it turns one name "
            "into a regex, of which PEFT keeps the last component. Nearest choice: all of this type "
            "(placement.granularity=type), or export to peft."
        )
    is_path = any(holder.path == name for holder in targets.holders)
    return [re.escape(name) if is_path else rf".*\.{re.escape(name)}"]
