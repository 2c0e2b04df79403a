"""What a placement's projections are called in Megatron, and the target names that match exactly those.

q, k, v are rows of linear_qkv, and gate, up of linear_fc1. Megatron-Bridge's LoRA adapts the fused linears,
CanonicalLoRA their parts (linear_q, linear_fc1_gate). Both match a target against a module's own name, or with `*`
against its path decoder.layers.0.self_attention.linear_qkv, where layers are counted per pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from plop_dist.errors import ExportError
from plop_dist.exporters.counts import fused_count_note
from plop_dist.exporters.holders import adapted, known_projections
from plop_dist.exporters.leaving_out import excluding
from plop_dist.exporters.refusals import one_rank, refuse_towers
from plop_dist.values.names import expert_index, layer_index, natural_key
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection

# Hugging Face name -> (Megatron's linear, CanonicalLoRA's name for this part of it).
_LINEARS: Mapping[str, tuple[str, str]] = {
    "q_proj": ("linear_qkv", "linear_q"),
    "k_proj": ("linear_qkv", "linear_k"),
    "v_proj": ("linear_qkv", "linear_v"),
    "o_proj": ("linear_proj", "linear_proj"),
    "gate_proj": ("linear_fc1", "linear_fc1_gate"),
    "up_proj": ("linear_fc1", "linear_fc1_up"),
    "down_proj": ("linear_fc2", "linear_fc2"),
}
_LATENT_LINEARS: Mapping[str, str] = {  # multi-head latent attention, where nothing is fused
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_b_proj": "linear_kv_up_proj",
}
PLACES = {"self_attention": "self_attention", "mlp": "mlp", "shared": "mlp.shared_experts", "experts": "mlp.experts"}


@dataclass(frozen=True)
class MegatronTargets:
    """Target names for Bridge's LoRA (`is_canonical` false) or CanonicalLoRA, with the one rank and its alpha.

    is_partial: CanonicalLoRA adapts only a part of some fused linear, which needs plop_dist.canonical_lora.
    """

    names: tuple[str, ...]
    is_canonical: bool
    is_partial: bool
    has_experts: bool
    rank: int
    alpha: float
    widened: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Linear:
    """One Megatron linear of the model: which of its parts exist and which are chosen."""

    name: str
    place: str
    layer: int | None
    parts: frozenset[str]
    chosen: frozenset[str]


def megatron_targets(placement: Placement, target: str, *, engine: str, widen: bool) -> MegatronTargets:
    """Return the target names under `engine`: "lora" (fused), "canonical", or "auto" (canonical where it is needed).

    Raises ExportError when fused LoRA is asked for and a fused linear is chosen in part (unless `widen`), and for
    projections without a Megatron name.
    """
    refuse_towers(placement, target)
    linears, notes = _linears(placement, target)
    splits = [linear for linear in linears if linear.chosen and len(linear.parts) > 1]
    partial = [linear for linear in splits if linear.chosen != linear.parts]
    is_canonical = engine == "canonical" or (engine == "auto" and bool(splits))
    widened: list[str] = []
    if not is_canonical:
        widened += _widen_to_fused(partial, target, widen)
    elif any(linear.chosen and linear.name == "linear_fc1" and len(linear.parts) == 1 for linear in linears):
        if partial:
            _refuse_ungated(target, placement)
        is_canonical = False
        notes = (*notes, "LoRA on fused linears: CanonicalLoRA cannot adapt an MLP without a gate.")
    ranks = {placement.rank_of(module) for module in placement.chosen}
    rank, alpha, same_rank = one_rank(ranks, placement, target, widen)
    if not is_canonical:
        notes = (*notes, *_fused_count(placement, linears, rank))
    names = _target_names(linears, is_canonical)
    if any(".layers." in name for name in names):
        _refuse_pipeline(placement, target)
        notes = (*notes, "Layers are counted per pipeline stage: keep pipeline_model_parallel_size at 1.")
    return MegatronTargets(
        names=names,
        is_canonical=is_canonical,
        is_partial=is_canonical and bool(partial),
        has_experts=any(linear.place == "experts" and linear.chosen for linear in linears),
        rank=rank,
        alpha=alpha,
        widened=(*widened, *same_rank),
        notes=notes,
    )


def _linears(placement: Placement, target: str) -> tuple[list[_Linear], tuple[str, ...]]:
    paths, notes = adapted(placement)
    known = known_projections(placement)
    latent = is_latent(known)
    members: dict[tuple[str, str, int | None], dict[str, list[Projection]]] = {}
    for item in known:
        names = megatron_name(item, latent)
        if names is None:
            if item.fqn in paths:
                raise ExportError(
                    f"{target} has no name for {item.fqn} (type {item.type}). Nearest choice: the placement without it "
                    f"({excluding(placement, [item.type])}), or export to peft.",
                    [item.type],
                )
            continue
        members.setdefault(linear_key(item, names[0]), {}).setdefault(names[1], []).append(item)
    linears = []
    for (name, place, layer), parts in members.items():
        chosen = set()
        for part, items in parts.items():
            wanted = [item for item in items if item.fqn in paths]
            if wanted and len(wanted) < len(items):
                raise ExportError(
                    f"{target} cannot adapt {wanted[0].fqn} without the other {len(items) - 1} of its kind in layer "
                    f"{layer}: Megatron names them alike. Nearest choice: all of them (placement.granularity=type)."
                )
            if wanted:
                chosen.add(part)
        linears.append(_Linear(name, place, layer, frozenset(parts), frozenset(chosen)))
    return linears, notes


def _fused_count(placement: Placement, linears: Iterable[_Linear], rank: int) -> tuple[str, ...]:
    """LoRA has one adapter for all rows of a fused linear, where the placement counts one for each part."""
    adapted_linears = {(linear.name, linear.place, linear.layer) for linear in linears if linear.chosen}
    known = known_projections(placement)
    latent = is_latent(known)
    key_of = {item.fqn: linear_key(item, names[0]) for item in known if (names := megatron_name(item, latent))}
    items = [item for item in known if key_of.get(item.fqn) in adapted_linears]
    splits = {key[0] for key in adapted_linears} & {"linear_qkv", "linear_fc1"}
    return fused_count_note(
        placement, items, lambda item: name if (name := key_of[item.fqn][0]) in splits else None, rank
    )


def is_latent(known: Iterable[Projection]) -> bool:
    """Tell whether the model has multi-head latent attention, whose linears have names of their own."""
    return any(_leaf(item) in ("kv_b_proj", "kv_a_proj_with_mqa") for item in known)


def linear_key(item: Projection, linear: str) -> tuple[str, str, int | None]:
    """Return Megatron's linear of a projection, the place that it has in a layer, and the layer."""
    return linear, _place(item, linear), layer_index(item.fqn)


def _target_names(linears: Iterable[_Linear], is_canonical: bool) -> tuple[str, ...]:
    # Bridge takes the first target that matches a linear, so all targets of one linear's name are of the same form.
    names: dict[str, None] = {}
    by_name: dict[str, list[_Linear]] = {}
    for linear in linears:
        by_name.setdefault(linear.name, []).append(linear)
    for alike in by_name.values():
        if len({linear.chosen for linear in alike}) == 1:
            names.update(dict.fromkeys(_written(alike[0], "", is_canonical)))
            continue
        for place in dict.fromkeys(linear.place for linear in alike):
            here = [linear for linear in alike if linear.place == place]
            # `*.experts.` would also hit shared_experts, because Bridge reads a dot as any character.
            dotted = f"{PLACES[place]}.{'*' if place == 'experts' else ''}"
            if len({linear.chosen for linear in here}) == 1:
                names.update(dict.fromkeys(_written(here[0], f"*.{dotted}", is_canonical)))
                continue
            for linear in here:
                prefix = f"*.layers.{linear.layer}.{dotted}"
                names.update(dict.fromkeys(_written(linear, prefix, is_canonical)))
    return tuple(names)


def _written(linear: _Linear, prefix: str, is_canonical: bool) -> list[str]:
    if not linear.chosen:
        return []
    if not is_canonical:
        return [f"{prefix}{linear.name}"]
    return [f"{prefix}{part}" for part in sorted(linear.chosen, key=list(_PART_ORDER).index)]


def megatron_name(item: Projection, latent: bool) -> tuple[str, str] | None:
    """Return Megatron's name for the linear that holds a projection, and CanonicalLoRA's for the part; or None."""
    leaf = _leaf(item)
    if latent and leaf in _LATENT_LINEARS:
        return _LATENT_LINEARS[leaf], _LATENT_LINEARS[leaf]
    return _LINEARS.get(leaf)


def _place(item: Projection, linear: str) -> str:
    if "fc" not in linear:
        return "self_attention"
    if expert_index(item.fqn) is not None:
        return "experts"
    return "shared" if ".shared_expert" in item.fqn else "mlp"


def _leaf(item: Projection) -> str:
    return item.fqn.rpartition(".")[2]


def _widen_to_fused(partial: list[_Linear], target: str, widen: bool) -> list[str]:
    if not partial:
        return []
    missing = {linear.name: linear.parts - linear.chosen for linear in partial}
    chosen = {linear.name: linear.chosen for linear in partial}
    described = "; ".join(
        f"{name} whole ({_listed(chosen[name])} and also {_listed(missing[name])})" for name in sorted(missing)
    )
    if not widen:
        parts = _listed(part for linear in partial for part in linear.chosen)
        raise ExportError(
            f"{target} adapts fused linears only, and the placement has a part of one: {parts}. Nearest choice: adapt "
            f"{described} (--widen), or use CanonicalLoRA (--to megatron-bridge, or --to verl --engine megatron)."
        )
    return [
        f"{name} is adapted whole: {_listed(missing[name])} as well as {_listed(chosen[name])}."
        for name in sorted(missing)
    ]


def _refuse_ungated(target: str, placement: Placement) -> None:
    raise ExportError(
        f"{target}: CanonicalLoRA cannot adapt an MLP without a gate (linear_fc1), and LoRA cannot adapt a part of "
        "linear_qkv. Nearest choice: all of q_proj, k_proj, v_proj beside up_proj, or "
        f"{excluding(placement, ['up_proj'])}.",
        ["up_proj"],
    )


def _refuse_pipeline(placement: Placement, target: str) -> None:
    pp_size = placement.source.parallel.get("pp", 1) or 1
    if pp_size > 1:
        raise ExportError(
            f"{target} names layers as each pipeline stage counts them, so with parallel.pp ({pp_size}) a layer's name "
            "is not its own. Nearest choice: whole types (placement.granularity=type), or parallel.pp=1."
        )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(sorted(set(parts), key=natural_key))


_PART_ORDER = (*(part for _, part in _LINEARS.values()), *_LATENT_LINEARS.values())
