"""Placement -> miles' flags: --lora-rank, --lora-alpha, --lora-type, --target-modules, for Megatron-Bridge's LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.refusals import RANKS, SHARED_EXPERTS, check_engine, refuse_shared_experts, whole_number
from plop_dist.exporters.text import shell_flags, shell_text
from plop_dist.values.placement import Export, Placement


class Miles:
    """miles' flags."""

    name = "miles"
    summary = "miles' flags, and a file of arguments to append to its command"
    engines = ("megatron",)
    keys = ("lora-rank", "lora-alpha", "lora-type", "target-modules")
    matching = "as in megatron-bridge"
    limits = (
        RANKS,
        "an alpha that is no whole number",
        SHARED_EXPERTS,
        "what megatron-bridge cannot express",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the flags and the same as a file.

        Raises ExportError for ranks that differ, and for routed experts, which would share one adapter.
        """
        check_engine(engine, self.engines, self.name)
        targets = megatron_targets(placement, self.name, engine="auto", widen=widen)
        refuse_shared_experts(targets.has_experts, self.name)
        fields = {
            "lora-rank": targets.rank,
            "lora-alpha": whole_number(targets.alpha, self.name),
            "lora-type": "canonical_lora" if targets.is_canonical else "lora",
            "target-modules": ",".join(targets.names),
        }
        needs = (
            "A part of a fused linear needs `import plop_dist.canonical_lora` in every Megatron process of miles.",
        )
        return Export(
            target=self.name,
            files={"miles.args": shell_text(fields)},
            flags=shell_flags(fields),
            notes=(*targets.notes, *(needs if targets.is_partial else ())),
            widened=targets.widened,
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what Bridge adapts, by --lora-type in parts or fused."""
        del where
        is_canonical = fields.get("lora-type", "lora") == "canonical_lora"
        names = fields["target-modules"].split(",")
        return read_megatron(names, int(fields["lora-rank"]), placement, is_canonical=is_canonical)


EXPORTER = Miles()
