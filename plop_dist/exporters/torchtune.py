"""Placement -> torchtune's overrides: model.lora_attn_modules, model.apply_lora_to_mlp, lora_rank, lora_alpha.

torchtune adapts any of q, k, v, output in every layer, and the MLP as one: gate, up and down or none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import adapted, known_projections
from plop_dist.exporters.leaving_out import excluding
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import EVERY_LAYER, RANKS, TOWERS, check_engine, one_rank, refuse_towers
from plop_dist.exporters.text import hydra_overrides, hydra_yaml, number
from plop_dist.values.placement import Export, Placement

_ATTENTION: Mapping[str, str] = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")


class Torchtune:
    """torchtune's overrides."""

    name = "torchtune"
    summary = "torchtune's overrides for its lora_* model builders, and the same as YAML"
    engines = ("torchtune",)
    keys = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output", "model.lora_rank",
            "model.lora_alpha")  # fmt: skip
    matching = "its own names for q, k, v and output in every layer, and the MLP as one"
    limits = (
        RANKS,
        EVERY_LAYER,
        TOWERS,
        "a part of the MLP (--widen: gate, up and down)",
        "no attention projection at all (--widen: the one with the lowest NFN)",
        "types other than q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the overrides and the same as YAML.

        Raises ExportError for a part of the MLP, no attention projection, single layers, experts, or ranks that differ;
        with `widen` the first three are adapted more widely instead.
        """
        check_engine(engine, self.engines, self.name)
        refuse_towers(placement, self.name)
        chosen, notes = adapted(placement)
        modules = placement.chosen
        types = list(dict.fromkeys(module.type for module in modules))
        _refuse_unknown(placement, types)
        widened = _missing_layers(placement, chosen, types, widen)
        has_mlp = _whole_mlp(placement, types, widened, widen)
        attention = _attention(placement, types, widened, widen)
        ranks = {placement.rank_of(module) for module in modules}
        rank, alpha, same_rank = one_rank(ranks, placement, self.name, widen)
        fields: dict[str, Any] = {
            "model.lora_attn_modules": [_ATTENTION[name] for name in attention],
            "model.apply_lora_to_mlp": has_mlp,
            "model.apply_lora_to_output": "lm_head" in types,
            "model.lora_rank": rank,
            "model.lora_alpha": number(alpha),
        }
        return Export(
            target=self.name,
            files={"torchtune.yaml": hydra_yaml(fields)},
            flags=hydra_overrides(fields),
            notes=(*notes, "model._component_ must be one of torchtune's lora_* builders."),
            widened=(*widened, *same_rank),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what torchtune adapts: its attention names, and the MLP and the head by their switches."""
        del where
        own = {name: type_ for type_, name in _ATTENTION.items()}
        types = [own.get(name, name) for name in as_list(fields["model.lora_attn_modules"])]
        types += _MLP if fields.get("model.apply_lora_to_mlp") else ()
        types += ["lm_head"] if fields.get("model.apply_lora_to_output") else []
        return found_by(placement, int(fields["model.lora_rank"]), types, lambda name, item: item.type == name)


EXPORTER = Torchtune()


def _refuse_unknown(placement: Placement, types: list[str]) -> None:
    unknown = [name for name in types if name not in (*_ATTENTION, *_MLP, "lm_head")]
    if unknown:
        raise ExportError(
            f"torchtune cannot adapt {', '.join(unknown)}: it knows {', '.join((*_ATTENTION, *_MLP))}. Nearest choice: "
            f"the placement without ({excluding(placement, unknown)}), or export to peft.",
            unknown,
        )


def _whole_mlp(placement: Placement, types: list[str], widened: list[str], widen: bool) -> bool:
    """Return whether the MLP is adapted; a part of it becomes the whole and is noted in `widened`."""
    mlp = [name for name in _MLP if name in types]
    if mlp and len(mlp) < len(_MLP):
        beside = ", ".join(name for name in _MLP if name not in mlp)
        if not widen:
            raise ExportError(
                f"torchtune cannot adapt {', '.join(mlp)} alone: apply_lora_to_mlp takes gate_proj, up_proj and "
                f"down_proj together. Nearest choice: {beside} as well (--widen), or none of them "
                f"({excluding(placement, _MLP)}).",
                _MLP,
            )
        widened.append(f"apply_lora_to_mlp adapts {beside} as well as {', '.join(mlp)}.")
    return bool(mlp)


def _attention(placement: Placement, types: list[str], widened: list[str], widen: bool) -> list[str]:
    """Return the attention projections to adapt, at least one; one that is not chosen is noted in `widened`."""
    attention = [name for name in _ATTENTION if name in types]
    if attention:
        return attention
    lowest = next((entry.type for entry in _by_nfn(placement) if entry.type in _ATTENTION), None)
    if lowest is None:
        raise ExportError(
            f"torchtune needs at least one attention projection, and the scores have none of {', '.join(_ATTENTION)}. "
            "Nearest choice: export to peft."
        )
    if not widen:
        raise ExportError(
            "torchtune needs at least one attention projection (lora_attn_modules must not be empty). Nearest "
            f"choice: {lowest} as well, of those the one with the lowest NFN (--widen)."
        )
    widened.append(f"lora_attn_modules has {lowest}, because torchtune needs one attention projection.")
    return [lowest]


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
