"""Placement -> LitGPT's finetune_lora: lora_query, lora_key, lora_value, lora_projection, lora_mlp, lora_head.

Each is on or off for every layer, and lora_mlp is gate, up and down together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.refusals import EVERY_LAYER, RANKS, TOWERS, WHOLE_ALPHA, check_engine, one_rank, whole_number
from plop_dist.exporters.switches import MLP, read_switches, switched
from plop_dist.exporters.text import shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement

_SWITCHES = {
    "lora_query": ("q_proj",),
    "lora_key": ("k_proj",),
    "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",),
    "lora_mlp": MLP,
    "lora_head": ("lm_head",),
}


class LitGPT:
    """LitGPT's switches."""

    name = "litgpt"
    summary = "LitGPT's flags of finetune_lora, and its --config file"
    engines = ("litgpt",)
    keys = ("lora_r", "lora_alpha", "lora_dropout", *_SWITCHES)
    matching = "a switch for each of q, k, v and the attention's output, the MLP as one, and the head"
    limits = (
        RANKS,
        WHOLE_ALPHA,
        EVERY_LAYER,
        TOWERS,
        "a part of the MLP (--widen: gate, up and down)",
        "types other than q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the flags and a --config file.

        Raises ExportError for a part of the MLP and single layers (unless `widen`), other types, and ranks that differ.
        """
        check_engine(engine, self.engines, self.name)
        on, widened, notes = switched(placement, self.name, _SWITCHES, widen)
        ranks = {placement.rank_of(module) for module in placement.chosen}
        rank, alpha, same_rank = one_rank(ranks, placement, self.name, widen)
        fields = {"lora_r": rank, "lora_alpha": whole_number(alpha, self.name), "lora_dropout": 0.0, **on}
        return Export(
            target=self.name,
            files={"litgpt.yaml": yaml_text(fields)},
            flags=shell_flags(fields),
            notes=notes,
            widened=(*widened, *same_rank),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what LitGPT adapts: what its switches say."""
        del where
        on = [name for name in _SWITCHES if str(fields.get(name, False)).lower() == "true"]
        return read_switches(placement, int(fields["lora_r"]), _SWITCHES, on)


EXPORTER = LitGPT()
