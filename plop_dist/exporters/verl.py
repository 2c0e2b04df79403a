"""Placement -> verl's Hydra overrides, for its FSDP engine (PEFT) and its Megatron engine (Megatron-Bridge).

Megatron: verl builds Bridge's own CanonicalLoRA, which fails on a part of a fused linear, so the overrides have it load
plop_dist.canonical_lora first (external_lib).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.list_exporter import ListExporter, as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.refusals import check_engine
from plop_dist.exporters.text import hydra_overrides, hydra_yaml, number
from plop_dist.values.placement import Export, Placement

_MODEL = "actor_rollout_ref.model"
_FSDP = ListExporter(
    name="verl",
    summary="the overrides of verl's FSDP engine",
    engine="fsdp",
    rank=f"{_MODEL}.lora_rank",
    alpha=f"{_MODEL}.lora_alpha",
    modules=f"{_MODEL}.target_modules",
    parameters=f"+{_MODEL}.target_parameters",  # not in verl's YAML, hence the plus
    file="verl_fsdp.yaml",
    text=hydra_yaml,
    flags=hydra_overrides,
)


class Verl:
    """verl's overrides."""

    name = "verl"
    summary = "verl's Hydra overrides, and the same as YAML"
    engines = ("fsdp", "megatron")
    keys = (
        *_FSDP.keys,
        *(f"{_MODEL}.lora.{key}" for key in ("type", "target_modules", "rank", "alpha", "share_expert_adapters")),
        f"{_MODEL}.external_lib",
    )
    matching = f"fsdp: {_FSDP.matching}; megatron: as in megatron-bridge"
    limits = (*(f"fsdp: {limit}" for limit in _FSDP.limits), "megatron: what megatron-bridge cannot express")
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the overrides and the same as YAML. engine: "fsdp" (default) or "megatron".

        Raises ExportError for ranks that differ, and under fsdp for a part of a fused linear.
        """
        if check_engine(engine, self.engines, self.name) == "megatron":
            return _export_megatron(placement, widen)
        return _FSDP.export(placement, widen=widen)

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what verl adapts: under Megatron where the keys are of that engine."""
        given = {key.lstrip("+"): value for key, value in fields.items()}
        if f"{_MODEL}.lora.target_modules" not in given:
            return _FSDP.read(fields, placement, where)
        is_canonical = given.get(f"{_MODEL}.lora.type") == "canonical_lora"
        names, rank = as_list(given[f"{_MODEL}.lora.target_modules"]), int(given[f"{_MODEL}.lora.rank"])
        return read_megatron(names, rank, placement, is_canonical=is_canonical)


EXPORTER = Verl()


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
        files={"verl_megatron.yaml": hydra_yaml(fields)},
        flags=hydra_overrides(fields),
        notes=targets.notes,
        widened=targets.widened,
    )
