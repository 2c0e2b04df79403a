"""Placement -> torchtitan's LoRAConverter: target_modules under torchtitan's names, rank, alpha.

torchtitan (0.3) matches the last component of a path in its tree of configurations: whole types in all layers, dense
and shared experts alike. There q, k and v are one linear `wqkv`, or, with fuse_qkv=False, `wq` and one `wkv` for both
k and v. A name that is not in the tree is only warned of, and adapts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.counts import fused_count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import adapted, known_projections
from plop_dist.exporters.leaving_out import excluding
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by, in_fused
from plop_dist.exporters.refusals import EVERY_LAYER, RANKS, TOWERS, check_engine, one_rank, refuse_towers
from plop_dist.exporters.text import python_list
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Export, Placement
from plop_dist.values.scores import Projection

_NAMES: Mapping[str, str] = {
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "lm_head",
}
_ATTENTION: Mapping[str, Mapping[str, str]] = {
    "fused": {"q_proj": "wqkv", "k_proj": "wqkv", "v_proj": "wqkv"},
    "separate": {"q_proj": "wq", "k_proj": "wkv", "v_proj": "wkv"},
}
_LATENT: Mapping[str, str] = {  # multi-head latent attention, where nothing is fused
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_b_proj": "wkv_b",
}


class Torchtitan:
    """torchtitan's LoRAConverter."""

    name = "torchtitan"
    summary = "a Python file that defines torchtitan's LoRAConverter, and the call"
    engines = tuple(_ATTENTION)
    keys = ("target_modules", "rank", "alpha")
    matching = "the last component in its tree of configurations: whole types, dense and shared experts alike"
    limits = (
        RANKS,
        EVERY_LAYER,
        TOWERS,
        "a part of wqkv (separate: of wkv, which is k and v; --widen: the whole)",
        "routed experts, and other types without a name: it knows wqkv, wo, w1, w2, w3, lm_head and latent attention's",
    )
    flags_in: Language = "python"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return a Python file that defines the converter, and the constructor call.

        engine: "fused" (default: torchtitan's own model flavors) or "separate" (models built with fuse_qkv=False).
        Raises ExportError for a part of wqkv or wkv and for single layers (unless `widen`), for routed experts,
        projections without a name, and ranks that differ.
        """
        engine = check_engine(engine, self.engines, self.name)
        refuse_towers(placement, self.name)
        chosen, notes = adapted(placement)
        known = known_projections(placement)
        names = _names_of(known, engine)
        modules = placement.chosen
        _refuse_unnamed(placement, names)
        types = {module.type for module in modules}
        targets = sorted({names[type_] for type_ in types}, key=list(names.values()).index)
        whole = [item for item in known if names.get(item.type) in targets]
        absent = [item for item in whole if item.fqn not in chosen]
        widened = _widen(placement, absent, names, engine, widen)
        ranks = {placement.rank_of(module) for module in modules}
        rank, alpha, same_rank = one_rank(ranks, placement, self.name, widen)
        count = fused_count_note(placement, whole, lambda m: "wqkv" if names[m.type] == "wqkv" else None, rank)
        call = f"LoRAConverter.Config(rank={rank}, alpha={float(alpha)!r}, target_modules={python_list(targets)})"
        return Export(
            target=self.name,
            files={
                "lora_converter.py": (
                    '"""The adapters of this run: add `lora` to the converters of model_registry(...)."""\n\n'
                    f"from torchtitan.components.lora import LoRAConverter\n\nlora = {call}\n"
                )
            },
            flags=(call,),
            notes=(*notes, *count, *_attention_note(targets)),
            widened=(*widened, *same_rank),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what the converter adapts: with wqkv among its names that of torchtitan's own flavors."""
        del where
        targets = as_list(fields["target_modules"])
        engine = "separate" if {"wq", "wkv"} & set(targets) else "fused"
        names = _names_of(known_projections(placement), engine)
        found = found_by(placement, int(fields["rank"]), targets, lambda name, item: names.get(item.type) == name)
        if "wqkv" not in targets:
            return found
        held = {
            item.fqn: in_fused(item, "wqkv") for item in known_projections(placement) if names.get(item.type) == "wqkv"
        }
        return replace(found, held=held)


EXPORTER = Torchtitan()


def _names_of(known: Sequence[Projection], engine: str) -> Mapping[str, str]:
    is_latent = any(item.type == "kv_b_proj" for item in known)
    return {**(_LATENT if is_latent else _ATTENTION[engine]), **_NAMES}


def _refuse_unnamed(placement: Placement, names: Mapping[str, str]) -> None:
    for module in placement.chosen:
        if module.type not in names:
            raise ExportError(
                f"torchtitan's LoRAConverter has no name for {module.fqn} (type {module.type}): it adapts "
                f"{', '.join(names)}. Nearest choice: {excluding(placement, [module.type])}.",
                [module.type],
            )


def _widen(
    placement: Placement, absent: Sequence[Projection], names: Mapping[str, str], engine: str, widen: bool
) -> list[str]:
    sentences = []
    chosen_types = {module.type for module in placement.chosen}
    for name in dict.fromkeys(names[item.type] for item in absent if item.type not in chosen_types):
        missing, present = [
            ", ".join(type_ for type_, own in names.items() if own == name and (type_ in chosen_types) == is_chosen)
            for is_chosen in (False, True)
        ]
        if not widen:
            other = ""
            if engine == "fused":
                other = " or --engine separate for a model built with fuse_qkv=False (there k_proj and v_proj are one),"
            raise ExportError(
                f"torchtitan adapts {name} whole, and the placement has only a part of it: {present}. Nearest choice: "
                f"{missing} as well (--widen),{other} or {excluding(placement, present.split(', '))}.",
                present.split(", "),
            )
        sentences.append(f"{name} is adapted whole: {missing} as well as {present}.")
    layers = [item for item in absent if item.type in chosen_types]
    if layers:
        types = ", ".join(sorted({item.type for item in layers}, key=natural_key))
        if not widen:
            raise ExportError(
                f"torchtitan adapts a projection in every layer, but the placement leaves out {layers[0].fqn}. "
                f"Nearest choice: all of {types} (--widen, or placement.granularity=type)."
            )
        sentences.append(f"{types} are adapted in every layer: {len(layers)} modules more.")
    return sentences


def _attention_note(targets: Sequence[str]) -> tuple[str, ...]:
    if "wqkv" in targets:
        return ("wqkv is the linear of a model built with fuse_qkv=True, as torchtitan's own flavors are.",)
    if "wkv" in targets:
        return ("wq and wkv are the linears of a model built with fuse_qkv=False.",)
    return ()
