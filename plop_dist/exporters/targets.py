"""Which Hugging Face modules and parameters a placement adapts, and the shortest names that match exactly those.

Frameworks built on PEFT match a name against the end of a module's path. Here a placement's logical projections become
the modules that hold them, and these become names that match them and nothing else of the scored model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from plop_dist.errors import ExportError
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import expert_index, layer_index, natural_key
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection

# PEFT 0.21 rewrites targets of these names for MoE models whose experts transformers 5 keeps as 3-D parameters: a dense
# or shared expert's `up_proj` would become the routed experts' gate_up_proj. As a parameter (`up_proj.weight`) the
# linear keeps its name. It also cuts every regex down to bare types there, so names are lists, never a regex.
_RENAMED_BESIDE_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})

# PEFT 0.21 raises for an out_proj in these (peft.tuners.tuners_utils).
_PASSED_BY_OUT_PROJ = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


@dataclass(frozen=True)
class Holder:
    """A module, or 3-D expert parameter, that gets one adapter.

    peft_path: what PEFT must be told, and whether it is a parameter (target_parameters) or a module.
    """

    path: str
    peft_path: str
    is_parameter: bool
    rank: int
    projections: tuple[Projection, ...]

    @property
    def is_expert_parameter(self) -> bool:
        """Whether the weights are slices of a 3-D parameter, so that no module of their own exists."""
        return self.projections[0].storage == "expert_parameter"


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
    def num_trainable_parameters(self) -> int:
        """The adapters' parameters, whole holders counted as PEFT counts them."""
        rank_of = {part.fqn: holder.rank for holder in self.holders for part in holder.projections}
        parts = [part for holder in self.holders for part in holder.projections]
        return num_trainable_parameters(parts, lambda part: rank_of[part.fqn])


def known_projections(placement: Placement) -> tuple[Projection, ...]:
    """Return every projection of the model that scoring saw, with or without a score."""
    return (*placement.source.modules, *placement.source.left_out)


def adapted(placement: Placement) -> tuple[set[str], tuple[str, ...]]:
    """Return the paths to adapt, and notes on those among them that have no score.

    A routed expert without a score (it saw no token) goes with its type when all scored ones are chosen. Other
    modules without a score do not: a vision tower's q_proj, which text never reaches, is no neighbour of the chosen.
    """
    chosen = set(placement.modules)
    partly = {module.type for module in placement.source.modules if module.fqn not in chosen}
    whole = {module.type for module in placement.chosen} - partly
    riding = [item for item in placement.source.left_out if item.type in whole and expert_index(item.fqn) is not None]
    notes = tuple(
        f"{count} {name} without a score ({reason}) are adapted with the rest of their type."
        for (name, reason), count in _tally((item.type, item.reason) for item in riding).items()
    )
    return chosen | {item.fqn for item in riding}, notes


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
    holders, widened = [], []
    for path, parts in by_holder.items():
        wanted = [part for part in parts if part.fqn in paths]
        if not wanted:
            continue
        _refuse_unfit(placement, target, wanted[0])
        if len(wanted) < len(parts):
            _refuse_part(target, path, wanted, parts, widen)
            beside = sorted({part.type for part in parts if part.fqn not in paths}, key=natural_key)
            widened.append(f"{path} is adapted whole: {', '.join(beside)} as well as {_types(wanted)}.")
        ranks = {placement.rank_of(part) for part in wanted}
        if len(ranks) > 1:
            _refuse_ranks(target, path, ranks, widen)
            widened.append(f"{path} has one adapter of rank {max(ranks)} instead of ranks {sorted(ranks)}.")
        holders.append(_holder(path, tuple(parts), max(ranks), has_experts))
    known = [_holder(path, tuple(parts), 1, has_experts) for path, parts in by_holder.items()]
    parameters = {holder.peft_path for holder in known if holder.is_parameter}
    # A module that only holds a parameter is none that PEFT can wrap (GraniteMoE: experts are an input_linear too).
    modules = {holder.peft_path for holder in known if not holder.is_parameter}
    modules |= {path.rpartition(".")[0] for path in parameters}
    return Targets(
        holders=tuple(holders),
        modules=shortest_names((holder.peft_path for holder in holders if not holder.is_parameter), modules),
        parameters=shortest_names(
            (holder.peft_path for holder in holders if holder.is_parameter), parameters, min_parts=2
        ),
        known_paths=tuple(by_holder),
        has_experts=has_experts,
        widened=tuple(widened),
        notes=notes,
    )


def uniform_rank(
    targets: Targets, placement: Placement, target: str, widen: bool
) -> tuple[int, float, tuple[str, ...]]:
    """Return the one rank, its alpha, and what was widened, for a target without ranks per module.

    alpha / rank stays the placement's. Raises ExportError when ranks differ and `widen` is false; then the highest is
    taken.
    """
    ranks = {holder.rank for holder in targets.holders}
    return one_rank(ranks, placement, target, widen)


def one_rank(ranks: set[int], placement: Placement, target: str, widen: bool) -> tuple[int, float, tuple[str, ...]]:
    """Return the one rank, its alpha, and what was widened; see uniform_rank."""
    rank = max(ranks)
    alpha = placement.alpha * rank / placement.rank
    if len(ranks) == 1:
        return rank, alpha, ()
    shown = ", ".join(map(str, sorted(ranks)))
    if not widen:
        raise ExportError(
            f"{target} takes one LoRA rank for all modules, but the placement has ranks {shown} (rank_pattern). "
            f"Nearest choice: rank {rank} everywhere (--widen), or placement.rank_pattern={{}}."
        )
    return rank, alpha, (f"rank {rank} everywhere instead of ranks {shown}.",)


def whole_number(alpha: float, target: str) -> int:
    """Return alpha as an integer. Raises ExportError when it is not one."""
    if alpha != int(alpha):
        raise ExportError(
            f"{target} takes a whole number as alpha, but the placement has alpha {alpha:g}. Nearest choice: "
            f"placement.alpha={max(1, round(alpha))}."
        )
    return int(alpha)


def number(alpha: float) -> int | float:
    """Return alpha as an integer where it is one, so that files show 32 and not 32.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def check_engine(engine: str | None, allowed: tuple[str, ...], target: str) -> str:
    """Return the engine, the first of `allowed` by default. Raises ExportError for any other."""
    if engine is None:
        return allowed[0]
    if engine not in allowed:
        raise ExportError(f"--engine is '{engine}', but {target} has: {', '.join(allowed)}.")
    return engine


def refuse_parameters(targets: Targets, target: str) -> None:
    """Raise ExportError if 3-D parameters are among the targets, for a framework without target_parameters."""
    if targets.parameters:
        raise ExportError(
            f"{target} cannot name parameters, and {', '.join(targets.parameters)} can only be adapted as such "
            "(target_parameters) beside experts kept as 3-D parameters. Nearest choice: leave these types out "
            "(placement.exclude), or export to peft, trl, axolotl, ms-swift or verl."
        )


def refuse_other_than_linears(targets: Targets, placement: Placement, adapter: str) -> None:
    """Raise ExportError for what is no nn.Linear; `adapter` says of what adapts linears only."""
    # Where a family has Conv1D at all (GPT-2), its fused c_attn is one too.
    has_conv1d = any(part.storage == "conv1d" for part in known_projections(placement))
    unfit = {"conv1d", "expert_parameter"} | ({"fused"} if has_conv1d else set())
    for holder in targets.holders:
        first = holder.projections[0]
        if first.storage in unfit:
            kind = "conv1d" if first.storage == "fused" else first.storage
            types = ",".join(sorted({part.type for part in holder.projections}, key=natural_key))
            raise ExportError(
                f"{adapter} nn.Linear only, and {holder.path} is none ({kind}). Nearest choice: leave it out "
                f"(placement.exclude=[{types}]), or export to peft."
            )


def fused_count_note(
    placement: Placement, items: Iterable[Projection], fused: Callable[[Projection], str | None], rank: int
) -> tuple[str, ...]:
    """Return a note when adapters on `items` at `rank` have another number of parameters than the placement.

    fused: the linear beside this projection that holds it in the target framework and gets one adapter for all its
    rows, or None where the target holds it as the Hugging Face model does.
    """

    def in_target(item: Projection) -> Projection:
        name = fused(item)
        if name is None:
            return item
        return item.model_copy(update={"storage": "fused", "stored_in": f"{item.fqn.rpartition('.')[0]}.{name}"})

    count = num_trainable_parameters(map(in_target, items), lambda _: rank)
    if count == placement.num_trainable_parameters:
        return ()
    return (f"{count:,} trainable parameters instead of the placement's {placement.num_trainable_parameters:,}.",)


def shortest_names(wanted: Iterable[str], known: Iterable[str], min_parts: int = 1) -> tuple[str, ...]:
    """Return the names that match all wanted paths and no other known one, by equality or as a dotted suffix.

    The shortest suffix that does; one that would reach up to a layer's number becomes the full path.

    >>> shortest_names(["m.0.mlp.up", "m.1.mlp.up"], ["m.0.mlp.up", "m.1.mlp.up", "m.0.shared.up"])
    ('mlp.up',)
    """
    wanted_paths = sorted(set(wanted), key=natural_key)
    foreign = {suffix for path in set(known) - set(wanted_paths) for suffix in _suffixes(path)}
    names: dict[str, None] = {}
    for path in wanted_paths:
        names.setdefault(_shortest_name(path, foreign, min_parts))
    return tuple(names)


def matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """Return the predicate that PEFT applies to a list of names."""
    wanted = set(names)
    return lambda path: any(suffix in wanted for suffix in _suffixes(path))


def _shortest_name(path: str, foreign: set[str], min_parts: int) -> str:
    parts = path.split(".")
    in_layer = (
        next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1) if layer_index(path) is not None else -1
    )
    for length in range(min(min_parts, len(parts)), len(parts) - in_layer):
        suffix = ".".join(parts[-length:])
        # A bare number would match the layers themselves.
        if suffix not in foreign and not parts[-length].isdigit():
            return suffix
    return path


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _holder(path: str, parts: tuple[Projection, ...], rank: int, has_experts: bool) -> Holder:
    if parts[0].storage == "expert_parameter":
        return Holder(path, path, True, rank, parts)
    if has_experts and path.rpartition(".")[2] in _RENAMED_BESIDE_EXPERTS:
        return Holder(path, f"{path}.weight", True, rank, parts)
    return Holder(path, path, False, rank, parts)


def _refuse_unfit(placement: Placement, target: str, part: Projection) -> None:
    kind = str((placement.source.model.model_extra or {}).get("model_type"))
    if part.storage == "router":
        reason = "it is a router that does more than W z, or keeps more than its weight, which PEFT's wrappers hide"
    elif kind in _PASSED_BY_OUT_PROJ and part.holder.rpartition(".")[2] == "out_proj":
        reason = f"PEFT refuses it in model type '{kind}', whose kernels read the weight past any adapter"
    else:
        return
    raise ExportError(
        f"{target} cannot adapt {part.fqn}: {reason}. Nearest choice: choose without it "
        f"(placement.exclude=[{part.type}])."
    )


def _refuse_part(target: str, path: str, wanted: list[Projection], parts: list[Projection], widen: bool) -> None:
    if widen:
        return
    if parts[0].storage == "expert_parameter":
        kind, unit = "the 3-D expert parameter", f"all experts' {_types(parts)}"
    else:
        kind, unit = "the fused linear", _types(parts)
    excluded = ",".join(sorted({part.type for part in wanted}, key=natural_key))
    raise ExportError(
        f"{target} cannot adapt {wanted[0].fqn} alone: it is a part of {kind} {path}, which holds {unit}. Nearest "
        f"choice: adapt {path.rpartition('.')[2]} whole (--widen), or choose without it "
        f"(placement.exclude=[{excluded}])."
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
