"""Placement -> torchtune's overrides: model.lora_attn_modules, model.apply_lora_to_mlp, lora_rank, lora_alpha.

torchtune adapts any of q, k, v, output in every layer, and the MLP as one: gate, up and down or none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.targets import adapted, check_engine, known_projections, number, one_rank
from plop_dist.exporters.text import hydra_overrides, nested, yaml_text
from plop_dist.values.placement import Export, Placement

_ATTENTION: Mapping[str, str] = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the overrides and the same as YAML.

    Raises ExportError for a part of the MLP, no attention projection, single layers, experts, or ranks that differ;
    with `widen` the first three are adapted more widely instead.
    """
    check_engine(engine, ("torchtune",), "torchtune")
    chosen, notes = adapted(placement)
    types = list(dict.fromkeys(module.type for module in placement.chosen))
    unknown = [name for name in types if name not in (*_ATTENTION, *_MLP, "lm_head")]
    if unknown:
        raise ExportError(
            f"torchtune cannot adapt {', '.join(unknown)}: it knows {', '.join((*_ATTENTION, *_MLP))}. Nearest choice: "
            f"the placement without (placement.exclude=[{','.join(unknown)}]), or export to peft."
        )
    widened = _missing_layers(placement, chosen, types, widen)
    attention = [name for name in _ATTENTION if name in types]
    mlp = [name for name in _MLP if name in types]
    if mlp and len(mlp) < len(_MLP):
        beside = ", ".join(name for name in _MLP if name not in mlp)
        if not widen:
            raise ExportError(
                f"torchtune cannot adapt {', '.join(mlp)} alone: apply_lora_to_mlp takes gate_proj, up_proj and "
                f"down_proj together. Nearest choice: {beside} as well (--widen), or "
                f"placement.exclude=[{','.join(mlp)}]."
            )
        widened.append(f"apply_lora_to_mlp adapts {beside} as well as {', '.join(mlp)}.")
    if not attention:
        lowest = next(entry.type for entry in _by_nfn(placement) if entry.type in _ATTENTION)
        if not widen:
            raise ExportError(
                "torchtune needs at least one attention projection (lora_attn_modules must not be empty). Nearest "
                f"choice: {lowest} as well, of those the one with the lowest NFN (--widen)."
            )
        attention = [lowest]
        widened.append(f"lora_attn_modules has {lowest}, because torchtune needs one attention projection.")
    ranks = {placement.rank_of(module) for module in placement.chosen}
    rank, alpha, same_rank = one_rank(ranks, placement, "torchtune", widen)
    fields: dict[str, Any] = {
        "model.lora_attn_modules": [_ATTENTION[name] for name in attention],
        "model.apply_lora_to_mlp": bool(mlp),
        "model.apply_lora_to_output": "lm_head" in types,
        "model.lora_rank": rank,
        "model.lora_alpha": number(alpha),
    }
    return Export(
        target="torchtune",
        files={"torchtune.yaml": yaml_text(nested(fields))},
        flags=hydra_overrides(fields),
        notes=(*notes, "model._component_ must be one of torchtune's lora_* builders."),
        widened=(*widened, *same_rank),
    )


def _missing_layers(placement: Placement, chosen: set[str], types: list[str], widen: bool) -> list[str]:
    absent = [item.fqn for item in known_projections(placement) if item.type in types and item.fqn not in chosen]
    if not absent:
        return []
    if not widen:
        raise ExportError(
            f"torchtune adapts a projection in every layer, but the placement leaves out {absent[0]} (and "
            f"{len(absent) - 1} more). Nearest choice: whole types (--widen, or placement.granularity=type)."
        )
    return [f"{', '.join(types)} are adapted in every layer: {len(absent)} modules more."]


def _by_nfn(placement: Placement) -> list[Any]:
    return sorted(placement.source.types, key=lambda entry: (entry.nfn, entry.type))
