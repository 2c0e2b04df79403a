"""Placement -> torchtitan's LoRAConverter: target_modules under torchtitan's names, rank, alpha.

torchtitan matches the last component of a module's path: whole types in all layers, dense and shared experts alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from plop_dist.errors import ExportError
from plop_dist.exporters.targets import adapted, check_engine, known_projections, one_rank
from plop_dist.names import natural_key
from plop_dist.types import Export, Placement, Projection

_NAMES: Mapping[str, str] = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "lm_head",
}


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return a Python file that defines the converter, and the constructor call.

    Raises ExportError for single layers (unless `widen`), routed experts, projections without a name, and ranks that
    differ.
    """
    check_engine(engine, ("torchtitan",), "torchtitan")
    chosen, notes = adapted(placement)
    names: dict[str, None] = {}
    for module in placement.chosen:
        if module.type not in _NAMES:
            raise ExportError(
                f"torchtitan's LoRAConverter has no name for {module.fqn} (type {module.type}): it adapts "
                f"{', '.join(_NAMES)}. Nearest choice: placement.exclude=[{module.type}]."
            )
        names[_NAMES[module.type]] = None
    absent = [
        item for item in known_projections(placement) if _NAMES.get(item.type) in names and item.fqn not in chosen
    ]
    widened = _widen_layers(absent, widen)
    ranks = {placement.rank_of(module) for module in placement.chosen}
    rank, alpha, same_rank = one_rank(ranks, placement, "torchtitan", widen)
    targets = sorted(names, key=list(_NAMES.values()).index)
    call = f"LoRAConverter.Config(rank={rank}, alpha={float(alpha)!r}, target_modules={json.dumps(targets)})"
    return Export(
        target="torchtitan",
        files={
            "lora_converter.py": (
                '"""The adapters of this run: add `lora` to the converters of model_registry(...)."""\n\n'
                f"from torchtitan.components.lora import LoRAConverter\n\nlora = {call}\n"
            )
        },
        flags=(call,),
        notes=(*notes, "The names are those of separate wq, wk, wv: leave torchtitan's fused QKV off."),
        widened=(*widened, *same_rank),
    )


def _widen_layers(absent: list[Projection], widen: bool) -> list[str]:
    if not absent:
        return []
    types = ", ".join(sorted({item.type for item in absent}, key=natural_key))
    if not widen:
        raise ExportError(
            f"torchtitan adapts a projection in every layer, but the placement leaves out {absent[0].fqn}. "
            f"Nearest choice: all of {types} (--widen, or placement.granularity=type)."
        )
    return [f"{types} are adapted in every layer: {len(absent)} modules more."]
