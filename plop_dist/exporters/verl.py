"""Placement -> verl's Hydra overrides, for its FSDP engine (PEFT) and its Megatron engine (Megatron-Bridge).

Megatron: verl builds Bridge's own CanonicalLoRA, which fails on a part of a fused linear, so the overrides have it load
plop_dist.canonical_lora first (external_lib).
"""

from __future__ import annotations

from typing import Any

from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import check_engine, hugging_face_targets, number, uniform_rank, whole_number
from plop_dist.exporters.text import hydra_overrides, nested, yaml_text
from plop_dist.values.placement import Export, Placement

_MODEL = "actor_rollout_ref.model"


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the overrides and the same as YAML. engine: "fsdp" (default) or "megatron".

    Raises ExportError for ranks that differ, and under fsdp for a part of a fused linear.
    """
    if check_engine(engine, ("fsdp", "megatron"), "verl") == "megatron":
        return _export_megatron(placement, widen)
    targets = hugging_face_targets(placement, "verl", widen)
    rank, alpha, widened = uniform_rank(targets, placement, "verl", widen)
    fields: dict[str, Any] = {
        f"{_MODEL}.lora_rank": rank,
        f"{_MODEL}.lora_alpha": whole_number(alpha, "verl"),
        f"{_MODEL}.target_modules": list(targets.modules),
    }
    if targets.parameters:
        fields[f"+{_MODEL}.target_parameters"] = list(targets.parameters)  # not in verl's YAML, hence the plus
    return Export(
        target="verl",
        files={"verl_fsdp.yaml": yaml_text(nested(fields))},
        flags=hydra_overrides(fields),
        notes=(*targets.notes, *count_note(placement, targets)),
        widened=(*targets.widened, *widened),
    )


def _export_megatron(placement: Placement, widen: bool) -> Export:
    targets = megatron_targets(placement, "verl's megatron engine", engine="auto", widen=widen)
    fields: dict[str, Any] = {
        f"{_MODEL}.lora.type": "canonical_lora" if targets.is_canonical else "lora",
        f"{_MODEL}.lora.target_modules": list(targets.names),
        f"{_MODEL}.lora.rank": targets.rank,
        f"{_MODEL}.lora.alpha": number(targets.alpha),
    }
    if targets.has_experts:
        fields[f"+{_MODEL}.lora.share_expert_adapters"] = False
    if targets.is_canonical:
        fields[f"{_MODEL}.external_lib"] = "plop_dist.canonical_lora"
    return Export(
        target="verl",
        files={"verl_megatron.yaml": yaml_text(nested(fields))},
        flags=hydra_overrides(fields),
        notes=targets.notes,
        widened=targets.widened,
    )
