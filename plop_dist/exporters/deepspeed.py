"""Placement -> deepspeed.linear.LoRAConfig for OptimizedLinear: target_mods, lora_r, lora_alpha.

DeepSpeed adapts every linear whose path contains one of target_mods anywhere: `up_proj` also hits `gate_up_proj`. Each
name is lengthened until it is contained in no other path.
"""

from __future__ import annotations

import json
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import (
    Targets,
    check_engine,
    hugging_face_targets,
    number,
    refuse_other_than_linears,
    uniform_rank,
)
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the LoRAConfig call and its fields as JSON.

    Raises ExportError for ranks that differ, a part of a fused linear, and modules that are no nn.Linear.
    """
    check_engine(engine, ("deepspeed",), "deepspeed")
    targets = hugging_face_targets(placement, "deepspeed", widen)
    fields, widened = _fields(placement, targets, widen)
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return Export(
        target="deepspeed",
        files={"deepspeed_lora.json": json.dumps(fields, indent=2) + "\n"},
        flags=(f"deepspeed.linear.LoRAConfig({arguments})",),
        notes=(
            *targets.notes,
            *count_note(placement, targets),
            "OptimizedLinear has no bias and is built together with the model (deepspeed.linear.Init).",
        ),
        widened=(*targets.widened, *widened),
    )


def to_config(placement: Placement, *, widen: bool = False, **options: Any) -> Any:
    """Return a deepspeed.linear.LoRAConfig; `options` override its fields, of which PEFT's `r` means lora_r.

    Raises ExportError as `export` does.
    """
    from deepspeed.linear import LoRAConfig

    options = {{"r": "lora_r"}.get(name, name): value for name, value in options.items()}
    fields, _ = _fields(placement, hugging_face_targets(placement, "deepspeed", widen), widen)
    return LoRAConfig(**{**fields, **options})


def _fields(placement: Placement, targets: Targets, widen: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    refuse_other_than_linears(targets, placement, "deepspeed's OptimizedLinear replaces")
    rank, alpha, widened = uniform_rank(targets, placement, "deepspeed", widen)
    return {"lora_r": rank, "lora_alpha": number(alpha), "target_mods": _target_mods(targets)}, widened


def _target_mods(targets: Targets) -> list[str]:
    # DeepSpeed searches in the prefix under which a module's weights are stored: its path and a dot.
    wanted = {f"{holder.path}." for holder in targets.holders}
    others = [f"{path}." for path in targets.known_paths if f"{path}." not in wanted]
    names: list[str] = []
    for path in sorted(wanted, key=natural_key):
        if any(name in path for name in names):
            continue
        parts = path.removesuffix(".").split(".")
        starts = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        candidates = [form for start in starts for form in (start, f".{start}", f".{start}.")]
        name = next((form for form in (*candidates, path) if form in path and not any(form in o for o in others)), None)
        if name is None:
            raise ExportError(
                f"deepspeed matches substrings, and {path[:-1]} is contained in another module's path. Nearest choice: "
                "choose both, or export to peft."
            )
        names.append(name)
    return names
