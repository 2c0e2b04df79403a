"""Placement -> AReaL's overrides, for its FSDP engine (PEFT) and its Megatron engine (Megatron-Bridge's fused LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.list_exporter import ListExporter, as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.refusals import SHARED_EXPERTS, check_engine, refuse_shared_experts, whole_number
from plop_dist.exporters.text import hydra_overrides, hydra_yaml
from plop_dist.values.placement import Export, Placement

# A configuration of AReaL need not have these keys, which Hydra then takes with two pluses alone.
_ACTOR = "++actor"
_FIRST = {f"{_ACTOR}.use_lora": True, f"{_ACTOR}.peft_type": "lora"}
_NOTE = "AReaL wants use_lora: true in the rollout section too, and a lora_name in gconfig."
_FSDP = ListExporter(
    name="areal",
    summary="the overrides of AReaL's FSDP engine",
    engine="fsdp",
    first=_FIRST,
    rank=f"{_ACTOR}.lora_rank",
    alpha=f"{_ACTOR}.lora_alpha",
    modules=f"{_ACTOR}.target_modules",
    notes=(_NOTE,),
    file="areal_fsdp.yaml",
    text=hydra_yaml,
    flags=hydra_overrides,
)


class AReaL:
    """AReaL's overrides."""

    name = "areal"
    summary = "AReaL's overrides, and the same as YAML"
    engines = ("fsdp", "megatron")
    keys = _FSDP.keys
    matching = f"fsdp: {_FSDP.matching}; megatron: as in megatron-bridge"
    limits = (
        *(f"fsdp: {limit}" for limit in _FSDP.limits),
        "megatron: a part of linear_qkv or linear_fc1 (--widen: the whole)",
        f"megatron: {SHARED_EXPERTS}",
        "megatron: an alpha that is no whole number",
        "megatron: what megatron-bridge cannot express",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the overrides and the same as YAML. engine: "fsdp" (default) or "megatron".

        Raises ExportError for ranks that differ, and a part of a fused linear (unless `widen`).
        """
        if check_engine(engine, self.engines, self.name) == "fsdp":
            return _FSDP.export(placement, widen=widen)
        targets = megatron_targets(placement, "areal's megatron engine", engine="lora", widen=widen)
        refuse_shared_experts(targets.has_experts, self.name)
        fields = {
            **_FIRST,
            f"{_ACTOR}.lora_rank": targets.rank,
            f"{_ACTOR}.lora_alpha": whole_number(targets.alpha, self.name),
            f"{_ACTOR}.target_modules": list(targets.names),
        }
        return Export(
            target=self.name,
            files={"areal_megatron.yaml": hydra_yaml(fields)},
            flags=hydra_overrides(fields),
            notes=(*targets.notes, _NOTE),
            widened=targets.widened,
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what AReaL adapts: with Megatron where the names are Megatron's."""
        names = as_list(fields["actor.target_modules"])
        if not any("linear_" in name for name in names):
            return _FSDP.read(fields, placement, where)
        return read_megatron(names, int(fields["actor.lora_rank"]), placement, is_canonical=False)


EXPORTER = AReaL()
