"""Placement -> SkyRL's overrides, for its FSDP engine (PEFT) and its Megatron engine (Megatron-Bridge).

Under Megatron the adapter alone is sent to vLLM (merge_lora false). SkyRL builds Bridge's own CanonicalLoRA, which
fails on a part of a fused linear: plop_dist.training.external.skyrl_job has its workers load plop_dist.canonical_lora.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.list_exporter import ListExporter, as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.refusals import check_engine, whole_number
from plop_dist.exporters.text import hydra_yaml, omegaconf_overrides
from plop_dist.values.placement import Export, Placement

_POLICY = "trainer.policy"
_LORA, _MEGATRON = f"{_POLICY}.model.lora", f"{_POLICY}.megatron_config.lora_config"
_JOB = "python -m plop_dist.training.external.skyrl_job"
_FSDP = ListExporter(
    name="skyrl",
    summary="the overrides of SkyRL's FSDP engine",
    engine="fsdp",
    first={"trainer.strategy": "fsdp"},
    rank=f"{_LORA}.rank",
    alpha=f"{_LORA}.alpha",
    modules=f"{_LORA}.target_modules",
    file="skyrl_fsdp.yaml",
    text=hydra_yaml,
    flags=omegaconf_overrides,
)


class SkyRL:
    """SkyRL's overrides."""

    name = "skyrl"
    summary = "SkyRL's overrides, and the same as YAML"
    engines = ("fsdp", "megatron")
    keys = (*_FSDP.keys, f"{_LORA}.share_expert_adapters", f"{_MEGATRON}.lora_type", f"{_MEGATRON}.merge_lora")
    matching = f"fsdp: {_FSDP.matching}; megatron: as in megatron-bridge"
    limits = (
        *(f"fsdp: {limit}" for limit in _FSDP.limits),
        "megatron: an alpha that is no whole number",
        "megatron: routed experts beside a part of a fused linear, where they would share one adapter",
        "megatron: what megatron-bridge cannot express",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the overrides and the same as YAML. engine: "fsdp" (default) or "megatron".

        Raises ExportError for ranks that differ, and under fsdp for a part of a fused linear.
        """
        if check_engine(engine, self.engines, self.name) == "megatron":
            return _export_megatron(placement, widen)
        return _FSDP.export(placement, widen=widen)

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what SkyRL adapts: under Megatron where the keys are of that engine."""
        if fields.get("trainer.strategy", "fsdp") != "megatron":
            return _FSDP.read(fields, placement, where)
        is_canonical = fields.get(f"{_MEGATRON}.lora_type") == "canonical_lora"
        names, rank = as_list(fields[f"{_LORA}.target_modules"]), int(fields[f"{_LORA}.rank"])
        return read_megatron(names, rank, placement, is_canonical=is_canonical)


EXPORTER = SkyRL()


def _export_megatron(placement: Placement, widen: bool) -> Export:
    targets = megatron_targets(placement, "skyrl's megatron engine", engine="auto", widen=widen)
    if targets.is_canonical and targets.has_experts:
        raise ExportError(
            "skyrl's megatron engine has all routed experts share one adapter beside a part of a fused linear "
            "(canonical_lora). Nearest choice: leave the experts out (placement.experts=false), choose all of q, k, v "
            "and of gate, up, or export to verl or megatron-bridge."
        )
    fields: dict[str, Any] = {
        "trainer.strategy": "megatron",
        f"{_LORA}.rank": targets.rank,
        f"{_LORA}.alpha": whole_number(targets.alpha, "skyrl"),
        f"{_LORA}.target_modules": list(targets.names),
        f"{_MEGATRON}.lora_type": "canonical_lora" if targets.is_canonical else "lora",
        f"{_MEGATRON}.merge_lora": False,
    }
    if targets.has_experts:
        fields[f"{_LORA}.share_expert_adapters"] = False
    notes = (f"A part of a fused linear needs plop_dist.canonical_lora in SkyRL's workers: {_JOB} loads it.",)
    return Export(
        target="skyrl",
        files={"skyrl_megatron.yaml": hydra_yaml(fields)},
        flags=omegaconf_overrides(fields),
        notes=(*targets.notes, *(notes if targets.is_partial else ())),
        widened=targets.widened,
    )
