"""Placement -> deepspeed.linear.LoRAConfig for OptimizedLinear: target_mods, lora_r, lora_alpha.

DeepSpeed adapts every linear whose path contains one of target_mods anywhere: `up_proj` also hits `gate_up_proj`. Each
name is lengthened until it is contained in no other path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import Targets, hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import LINEARS, PART, RANKS, check_engine, one_rank, refuse_other_than_linears
from plop_dist.exporters.substrings import shortest_substrings
from plop_dist.exporters.text import number, python_arguments
from plop_dist.values.placement import Export, Placement


class DeepSpeed:
    """DeepSpeed's OptimizedLinear."""

    name = "deepspeed"
    summary = "the LoRAConfig of deepspeed.linear (OptimizedLinear), as a call and as JSON"
    engines = ("deepspeed",)
    keys = ("lora_r", "lora_alpha", "target_mods")
    matching = "every path that contains it"
    limits = (LINEARS, PART, RANKS, "a module whose whole path another module's path contains")
    flags_in: Language = "python"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the LoRAConfig call and its fields as JSON.

        Raises ExportError for ranks that differ, a part of a fused linear, and modules that are no nn.Linear.
        """
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        fields, widened = _fields(placement, targets, widen)
        return Export(
            target=self.name,
            files={"deepspeed_lora.json": json.dumps(fields, indent=2) + "\n"},
            flags=(f"deepspeed.linear.LoRAConfig({python_arguments(fields)})",),
            notes=(
                *targets.notes,
                *count_note(placement, targets),
                "OptimizedLinear has no bias and is built together with the model (deepspeed.linear.Init).",
            ),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what OptimizedLinear adapts: paths that contain a name."""
        del where
        names = as_list(fields["target_mods"])
        return found_by(placement, int(fields["lora_r"]), names, lambda name, item: name in item.holder)

    def to_config(self, placement: Placement, *, widen: bool = False, **options: Any) -> Any:
        """Return a deepspeed.linear.LoRAConfig; `options` override its fields, of which PEFT's `r` means lora_r.

        Raises ExportError as `export` does.
        """
        from deepspeed.linear import LoRAConfig

        options = {{"r": "lora_r"}.get(name, name): value for name, value in options.items()}
        fields, _ = _fields(placement, hugging_face_targets(placement, self.name, widen), widen)
        return LoRAConfig(**{**fields, **options})


EXPORTER = DeepSpeed()


def _fields(placement: Placement, targets: Targets, widen: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    refuse_other_than_linears(targets, placement, "deepspeed's OptimizedLinear replaces")
    rank, alpha, widened = one_rank(targets.ranks, placement, "deepspeed", widen)
    wanted = {holder.path for holder in targets.holders}
    names, contained = shortest_substrings(wanted, [path for path in targets.known_paths if path not in wanted])
    if contained is not None:
        raise ExportError(
            f"deepspeed matches substrings, and {contained} is contained in another module's path. Nearest choice: "
            "choose both, or export to peft."
        )
    return {"lora_r": rank, "lora_alpha": number(alpha), "target_mods": names}, widened
