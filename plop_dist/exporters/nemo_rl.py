"""Placement -> NeMo-RL's overrides, for DTensor (Automodel's LoRA) and Megatron (Bridge's fused LoRA only)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.patterns import shortest_patterns
from plop_dist.exporters.refusals import (
    LINEARS,
    PART,
    RANKS,
    WHOLE_ALPHA,
    check_engine,
    one_rank,
    refuse_other_than_linears,
    whole_number,
)
from plop_dist.exporters.text import hydra_overrides, hydra_yaml
from plop_dist.values.placement import Export, Placement

_MEGATRON = "policy.megatron_cfg.peft"


class NemoRL:
    """NeMo-RL's overrides."""

    name = "nemo-rl"
    summary = "NeMo-RL's overrides, and the same as YAML"
    engines = ("dtensor", "automodel", "megatron")
    keys = (
        *(f"policy.{section}_cfg.lora_cfg.{key}" for section in ("dtensor", "automodel") for key in
          ("enabled", "target_modules", "exclude_modules", "match_all_linear", "dim", "alpha")),
        *(f"{_MEGATRON}.{key}" for key in
          ("enabled", "target_modules", "exclude_modules", "dim", "alpha", "share_expert_adapters")),
    )  # fmt: skip
    matching = "dtensor: a whole path, * for any text, a dot for any character; megatron: as in megatron-bridge"
    limits = (
        RANKS,
        WHOLE_ALPHA,
        f"dtensor: {LINEARS}",
        f"dtensor: {PART}",
        "megatron: a part of linear_qkv or linear_fc1 (--widen: the whole)",
        "megatron: what megatron-bridge cannot express",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the overrides and the same as YAML.

        engine: "dtensor" (default), "automodel" (the same under the name it has from NeMo-RL 0.8), or "megatron".
        Raises ExportError for ranks that differ; under megatron for a part of linear_qkv or linear_fc1.
        """
        engine = check_engine(engine, self.engines, self.name)
        return _export_megatron(placement, widen) if engine == "megatron" else _export_dtensor(placement, engine, widen)

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what NeMo-RL adapts, by the section that the file has."""
        del where
        if f"{_MEGATRON}.target_modules" in fields:
            names, rank = as_list(fields[f"{_MEGATRON}.target_modules"]), int(fields[f"{_MEGATRON}.dim"])
            return read_megatron(names, rank, placement, is_canonical=False)
        section = next(
            name for name in (f"policy.{kind}_cfg.lora_cfg" for kind in ("dtensor", "automodel"))
            if f"{name}.target_modules" in fields
        )  # fmt: skip
        rank, patterns = int(fields[f"{section}.dim"]), as_list(fields[f"{section}.target_modules"])
        regexes = {pattern: re.compile(pattern.replace("*", ".*")) for pattern in patterns}
        return found_by(placement, rank, patterns, lambda name, item: bool(regexes[name].fullmatch(item.holder)))


EXPORTER = NemoRL()


def _export_dtensor(placement: Placement, engine: str, widen: bool) -> Export:
    targets = hugging_face_targets(placement, "nemo-rl", widen)
    refuse_other_than_linears(targets, placement, "nemo-rl's Automodel adapts")
    rank, alpha, widened = one_rank(targets.ranks, placement, "nemo-rl", widen)
    section = f"policy.{engine}_cfg.lora_cfg"
    patterns = shortest_patterns([holder.path for holder in targets.holders], targets.known_paths)
    fields: dict[str, Any] = {
        f"{section}.enabled": True,
        f"{section}.target_modules": patterns,
        f"{section}.exclude_modules": [],
        f"{section}.match_all_linear": False,
        f"{section}.dim": rank,
        f"{section}.alpha": whole_number(alpha, "nemo-rl"),
    }
    notes = [*targets.notes, *count_note(placement, targets)]
    if engine == "dtensor":
        notes.append("NeMo-RL 0.8 calls policy.dtensor_cfg policy.automodel_cfg: use --engine automodel there.")
    return Export(
        target="nemo-rl",
        files={f"nemo_rl_{engine}.yaml": hydra_yaml(fields)},
        flags=hydra_overrides(fields),
        notes=tuple(notes),
        widened=(*targets.widened, *widened),
    )


def _export_megatron(placement: Placement, widen: bool) -> Export:
    targets = megatron_targets(placement, "nemo-rl's megatron engine", engine="lora", widen=widen)
    fields: dict[str, Any] = {
        f"{_MEGATRON}.enabled": True,
        f"{_MEGATRON}.target_modules": list(targets.names),
        f"{_MEGATRON}.exclude_modules": [],
        f"{_MEGATRON}.dim": targets.rank,
        f"{_MEGATRON}.alpha": whole_number(targets.alpha, "nemo-rl"),
    }
    if targets.has_experts:
        fields[f"{_MEGATRON}.share_expert_adapters"] = False
    return Export(
        target="nemo-rl",
        files={"nemo_rl_megatron.yaml": hydra_yaml(fields)},
        flags=hydra_overrides(fields),
        notes=targets.notes,
        widened=targets.widened,
    )
