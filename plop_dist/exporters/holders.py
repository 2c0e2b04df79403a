"""Which Hugging Face modules and parameters a placement adapts.

A placement's logical projections become the modules that hold them, and these become names that match them and nothing
else of the scored model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plop_dist.errors import ExportError
from plop_dist.exporters.leaving_out import excluding
from plop_dist.exporters.suffixes import shortest_names
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import expert_index, natural_key
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection

# PEFT 0.21 rewrites targets of these names for MoE models whose experts transformers 5 keeps as 3-D parameters: a dense
# or shared expert's `up_proj` would become the routed experts' gate_up_proj. As a parameter (`up_proj.weight`) the
# linear keeps its name. It also cuts every regex down to bare types there, so names are lists, never a regex.
RENAMED_BESIDE_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})

# PEFT 0.21 raises for an out_proj in these (peft.tuners.tuners_utils).
PASSED_BY_OUT_PROJ = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


@dataclass(frozen=True, slots=True)
class Holder:
    """A module, or 3-D expert parameter, that gets one adapter.

    peft_path: what PEFT must be told, and whether it is a parameter (target_parameters) or a module.
    """

    path: str
    peft_path: str
    is_parameter: bool
    rank: int
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class Targets:
    """What a PEFT-based framework is asked to adapt.

    modules, parameters: the shortest exact names (a name matches a path that is equal to it or ends with "." + it).
    known_paths: every module or expert parameter of the model, adapted or not. widened: what is adapted beyond the
    placement, one sentence each.
    """

    holders: tuple[Holder, ...]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    known_paths: tuple[str, ...]
    has_experts: bool
    widened: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ranks(self) -> set[int]:
        """The ranks of all adapters."""
        return {holder.rank for holder in self.holders}

    @property
    def num_trainable_parameters(self) -> int:
        """The adapters' parameters, whole holders counted as PEFT counts them."""
        rank_of = {part.fqn: holder.rank for holder in self.holders for part in holder.projections}
        parts = [part for holder in self.holders for part in holder.projections]
        return num_trainable_parameters(parts, lambda part: rank_of[part.fqn])


def modules_above(path: str) -> Iterator[str]:
    """Yield the paths of the modules that a module or parameter lies in, the nearest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def known_projections(placement: Placement) -> tuple[Projection, ...]:
    """Return every projection of the model that scoring saw, with or without a score."""
    return (*placement.source.modules, *placement.source.left_out)


def adapted(placement: Placement) -> tuple[set[str], tuple[str, ...]]:
    """Return the paths to adapt, and notes on those among them that have no score.

    A routed expert without a score (it saw no token) goes with its type when all scored ones are chosen. Other
    modules without a score do not: a vision tower's q_proj, which text never reaches, is no neighbour of the chosen.
    """
    chosen = set(placement.modules)
    types: tuple[set[str], set[str]] = (set(), set())
    for module in placement.source.modules:
        types[module.fqn in chosen].add(module.type)
    whole = types[True] - types[False]
    riding = [item for item in placement.source.left_out if item.type in whole and expert_index(item.fqn) is not None]
    notes = tuple(
        f"{count} {name} without a score ({reason}) are adapted with the rest of their type."
        for (name, reason), count in _tally((item.type, item.reason) for item in riding).items()
    )
    chosen.update(item.fqn for item in riding)
    return chosen, notes


def hugging_face_targets(placement: Placement, target: str, widen: bool) -> Targets:
    """Return what to adapt in the Hugging Face model.

    Raises ExportError when only a part of a fused linear (or of a 3-D expert parameter) is chosen and `widen` is false,
    and for modules that PEFT refuses, or wraps into something that fails.
    """
    paths, notes = adapted(placement)
    by_holder: dict[str, list[Projection]] = {}
    for projection in known_projections(placement):
        by_holder.setdefault(projection.holder, []).append(projection)
    has_experts = any(parts[0].storage == "expert_parameter" for parts in by_holder.values())
    holders: list[Holder] = []
    widened: dict[str, list[str]] = {}
    for path, parts in by_holder.items():
        wanted = [part for part in parts if part.fqn in paths]
        if not wanted:
            continue
        _refuse_unfit(placement, target, wanted[0])
        if len(wanted) < len(parts):
            _refuse_part(placement, target, wanted, parts, widen)
            widened.setdefault(_widened_to(parts, paths), []).append(path)
        ranks = {placement.rank_of(part) for part in wanted}
        if len(ranks) > 1:
            _refuse_ranks(target, path, ranks, widen)
            widened.setdefault(f"adapted at rank {max(ranks)} instead of ranks {sorted(ranks)}", []).append(path)
        holders.append(Holder(path, *_in_peft(path, parts, has_experts), max(ranks), tuple(parts)))
    known = [_in_peft(path, parts, has_experts) for path, parts in by_holder.items()]
    parameters = {path for path, is_parameter in known if is_parameter}
    # A module that only holds a parameter is none that PEFT can wrap (GraniteMoE: experts are an input_linear too).
    modules = {path for path, is_parameter in known if not is_parameter}
    modules.update(path.rpartition(".")[0] for path in parameters)
    # Nor a module around a linear (Gemma 4's ClippableLinear), whose name would match first.
    modules.update(above for path in by_holder for above in modules_above(path))
    return Targets(
        holders=tuple(holders),
        modules=shortest_names((holder.peft_path for holder in holders if not holder.is_parameter), modules),
        parameters=shortest_names(
            (holder.peft_path for holder in holders if holder.is_parameter), parameters, min_parts=2
        ),
        known_paths=tuple(by_holder),
        has_experts=has_experts,
        widened=tuple(_sentence(members, what) for what, members in widened.items()),
        notes=notes,
    )


def _widened_to(parts: list[Projection], paths: set[str]) -> str:
    if parts[0].storage == "expert_parameter":
        return f"adapted whole: all experts' {_types(parts)}, of which the placement has a part"
    wanted, beside = [part for part in parts if part.fqn in paths], [part for part in parts if part.fqn not in paths]
    return f"adapted whole: {_types(beside)} as well as {_types(wanted)}"


def _sentence(members: list[str], what: str) -> str:
    """Return one sentence for all holders of which the same is true: a model may have thousands."""
    if len(members) == 1:
        return f"{members[0]} is {what}."
    return f"{members[0]} and {len(members) - 1:,} more are {what}."


def _in_peft(path: str, parts: list[Projection], has_experts: bool) -> tuple[str, bool]:
    """Return what PEFT must be told for this holder, and whether that is a parameter."""
    if parts[0].storage == "expert_parameter":
        return path, True
    if has_experts and path.rpartition(".")[2] in RENAMED_BESIDE_EXPERTS:
        return f"{path}.weight", True
    return path, False


def _refuse_unfit(placement: Placement, target: str, part: Projection) -> None:
    kind = str((placement.source.model.model_extra or {}).get("model_type"))
    if part.storage == "router":
        reason = "it is a router that does more than W z, or keeps more than its weight, which PEFT's wrappers hide"
    elif kind in PASSED_BY_OUT_PROJ and part.holder.rpartition(".")[2] == "out_proj":
        reason = f"PEFT refuses it in model type '{kind}', whose kernels read the weight past any adapter"
    else:
        return
    raise ExportError(
        f"{target} cannot adapt {part.fqn}: {reason}. Nearest choice: choose without it "
        f"({excluding(placement, [part.type])}).",
        [part.type],
    )


def _refuse_part(
    placement: Placement, target: str, wanted: list[Projection], parts: list[Projection], widen: bool
) -> None:
    if widen:
        return
    if parts[0].storage == "expert_parameter":
        kind, unit = "the 3-D expert parameter", f"all experts' {_types(parts)}"
    else:
        kind, unit = "the fused linear", _types(parts)
    path, types = parts[0].holder, sorted({part.type for part in wanted}, key=natural_key)
    raise ExportError(
        f"{target} cannot adapt {wanted[0].fqn} alone: it is a part of {kind} {path}, which holds {unit}. Nearest "
        f"choice: adapt {path.rpartition('.')[2]} whole (--widen), or choose without it "
        f"({excluding(placement, types)}).",
        types,
    )


def _refuse_ranks(target: str, path: str, ranks: set[int], widen: bool) -> None:
    if not widen:
        raise ExportError(
            f"{target} gives {path} one adapter of one rank, but the placement has ranks {sorted(ranks)} for its "
            f"parts. Nearest choice: rank {max(ranks)} for all of them (--widen), or placement.rank_pattern={{}}."
        )


def _types(parts: Iterable[Projection]) -> str:
    return ", ".join(sorted({part.type for part in parts}, key=natural_key))


def _tally(items: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts
