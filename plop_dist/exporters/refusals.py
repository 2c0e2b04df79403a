"""What a target cannot express, as errors that name the nearest choice: engines, ranks, alphas, kinds of weights."""

from __future__ import annotations

from plop_dist.errors import ExportError
from plop_dist.exporters.holders import Targets, known_projections
from plop_dist.exporters.leaving_out import excluding
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement

# What several exporters say in their `limits`.
PART = "a part of a fused linear or 3-D expert parameter, or two ranks in one (--widen: the whole, at the highest rank)"
UNFIT = "what PEFT cannot adapt: routers that do more than W z, out_proj of Mamba blocks"
RANKS = "ranks that differ (--widen: the highest everywhere)"
WHOLE_ALPHA = "an alpha that is no whole number"
PARAMETERS = "experts kept as 3-D parameters, and what PEFT renames beside them"
LINEARS = "weights that are no nn.Linear: experts kept as 3-D parameters, Conv1D"
SHARED_EXPERTS = "routed experts, which would share one adapter"
TOWERS = "models that read more than text, whose towers it names like their language models"
EVERY_LAYER = "single layers (--widen: every layer)"


def check_engine(engine: str | None, allowed: tuple[str, ...], target: str) -> str:
    """Return the engine, the first of `allowed` by default. Raises ExportError for any other."""
    if engine is None:
        return allowed[0]
    if engine not in allowed:
        raise ExportError(f"--engine is '{engine}', but {target} has: {', '.join(allowed)}.")
    return engine


def one_rank(ranks: set[int], placement: Placement, target: str, widen: bool) -> tuple[int, float, tuple[str, ...]]:
    """Return the one rank, its alpha, and what was widened, for a target without ranks per module.

    alpha / rank stays the placement's. Raises ExportError when ranks differ and `widen` is false; then the highest is
    taken.
    """
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


def refuse_parameters(targets: Targets, target: str) -> None:
    """Raise ExportError if 3-D parameters are among the targets, for a framework without target_parameters."""
    if targets.parameters:
        types = {part.type for holder in targets.holders if holder.is_parameter for part in holder.projections}
        raise ExportError(
            f"{target} cannot name parameters, and {', '.join(targets.parameters)} can only be adapted as such "
            "(target_parameters) beside experts kept as 3-D parameters. Nearest choice: leave these types out "
            "(placement.exclude), or export to peft, trl, axolotl, ms-swift or verl.",
            sorted(types, key=natural_key),
        )


def refuse_shared_experts(has_experts: bool, target: str) -> None:
    """Raise ExportError for routed experts in a framework that gives all of them one adapter of Bridge's LoRA."""
    if has_experts:
        raise ExportError(
            f"{target} gives all routed experts of a rank one adapter together (share_expert_adapters), where the "
            "placement has one for each. Nearest choice: leave the experts out (placement.experts=false), or export to "
            "megatron-bridge or verl."
        )


def refuse_towers(placement: Placement, target: str) -> None:
    """Raise ExportError for a model with towers, or with an encoder beside its decoder.

    For a target whose names tell neither from the language model.
    """
    if (placement.source.model.model_extra or {}).get("is_encoder_decoder"):
        raise ExportError(
            f"{target} names modules alike in encoder and decoder. Nearest choice: export to peft, trl or verl, which "
            "name paths."
        )
    other = next((item for item in known_projections(placement) if item.part != "language"), None)
    if other is not None:
        raise ExportError(
            f"{target} names modules alike in all parts of a model, and this one has a part besides its language "
            f"model ({other.part}, e.g. {other.fqn}), which would be adapted as well. Nearest choice: export to peft, "
            "trl or verl, which name paths."
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
            types = sorted({part.type for part in holder.projections}, key=natural_key)
            raise ExportError(
                f"{adapter} nn.Linear only, and {holder.path} is none ({kind}). Nearest choice: leave it out "
                f"({excluding(placement, types)}), or export to peft.",
                types,
            )
