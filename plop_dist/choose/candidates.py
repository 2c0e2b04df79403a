"""Which modules a policy may choose from, grouped into the units it chooses between, and why the others are out."""

# M scored modules, U units (types, layers or modules), b rows of NFN values

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.bootstrap import group_means
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError, suggest
from plop_dist.values.names import natural_key, path_matches
from plop_dist.values.scores import LeftOut, ModuleScore, Projection

# Input and output embeddings under names other than lm_head, which the default `exclude` covers.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "embed_out", "wte", "wpe", "word_embeddings", "tok_embeddings"})
# What steers tokens to experts. Frameworks leave it without an adapter, and so does a policy unless `include` names it.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# DeepSeek V3.2's selection of tokens: its output is a top-k.
_INDEXER = "indexer"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?\b|moe|dense_?relu_?dense|intermediate", re.IGNORECASE)
_ATTENTION_TYPES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_MLP_TYPES = frozenset({"fc1", "fc2", "fc_in", "fc_out", "up_proj", "gate_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class Candidates:
    """The units a policy chooses between, in natural order of their names.

    unit_M: (M,) int64, the unit of each scored module, -1 for one that may not be chosen; reasons: why not, by path;
    left_out: the projections without a score, which are never chosen but may share a fused weight with chosen ones.
    """

    modules: tuple[ModuleScore, ...]
    units: tuple[str, ...]
    unit_M: np.ndarray
    reasons: dict[str, str]
    left_out: tuple[LeftOut, ...] = ()

    def values(self, nfn_bM: np.ndarray) -> np.ndarray:
        """Return the mean NFN of each unit: (b, U), float64, NaN without a token.

        Rounded to 12 decimals, so that equal scores tie whatever the order of their summation.
        """
        return np.round(group_means(nfn_bM, self.unit_M, len(self.units)), 12)

    def members(self, chosen_U: np.ndarray) -> tuple[ModuleScore, ...]:
        """Return the modules of the chosen units, in natural order. chosen_U: (U,), bool."""
        chosen_M = (self.unit_M >= 0) & chosen_U[self.unit_M]
        members = [module for module, chosen in zip(self.modules, chosen_M, strict=True) if chosen]
        return tuple(sorted(members, key=lambda module: natural_key(module.fqn)))


def find_candidates(
    modules: Sequence[ModuleScore], config: PlacementConfig, left_out: Sequence[LeftOut] = ()
) -> Candidates:
    """Return what `config` lets a policy choose between.

    Raises PlacementError when an entry of exclude, include or rank_pattern matches no module of the model (entries
    of the default `exclude` may), or when nothing is left.
    """
    _check_names(modules, config, left_out)
    reasons: dict[str, str] = {}
    unit_of: dict[str, str] = {}
    has_experts = any(projection.type.startswith("experts.") for projection in (*modules, *left_out))
    for module in modules:
        reason = _reason_out(module, config, has_experts)
        if reason:
            reasons[module.fqn] = reason
        else:
            unit_of[module.fqn] = _unit(module, config)
    if not unit_of:
        texts = "; ".join(f"{name}: {text}" for name, text in _reason_per_type(modules, reasons))
        raise PlacementError(f"No module is left to choose from ({texts}); relax placement.exclude, include or policy.")
    units = tuple(sorted(set(unit_of.values()), key=natural_key))
    index = {name: position for position, name in enumerate(units)}
    unit_M = np.array([index[unit_of[m.fqn]] if m.fqn in unit_of else -1 for m in modules], dtype=np.int64)
    return Candidates(tuple(modules), units, unit_M, reasons, tuple(left_out))


def matches(projection: Projection, entry: str) -> bool:
    """Tell whether an entry of exclude or include names this projection: its type, path, dotted suffix or pattern."""
    return entry == projection.type or path_matches(projection.fqn, entry)


def _unit(module: ModuleScore, config: PlacementConfig) -> str:
    if config.granularity == "module":
        return module.fqn
    return module.type if config.granularity == "type" else f"layer.{module.layer}"


def _reason_out(module: ModuleScore, config: PlacementConfig, has_experts: bool) -> str | None:
    if module.type in _EMBEDDINGS:
        return "embeddings never get an adapter"
    if module.type.startswith("experts.") and not config.experts:
        return "routed expert; placement.experts is false"
    for entry in config.exclude:
        if matches(module, entry):
            return f"excluded by '{entry}'"
    is_included = any(matches(module, entry) for entry in config.include)
    if config.include and not is_included:
        return "not in placement.include"
    # GraniteMoE's and Hunyuan's are linears inside a module of that name (router.layer, gate.wg).
    is_named = not _ROUTERS.isdisjoint(module.fqn.split(".")[-2:])
    is_router = module.storage == "router" or (has_experts and is_named)
    if is_router and not is_included:
        return "router of experts; only placement.include chooses it"
    if _INDEXER in module.fqn.split(".") and not is_included:
        return "picks tokens for sparse attention, where no gradient reaches it; only placement.include chooses it"
    if config.policy == "attention" and not is_attention(module):
        return "not an attention projection"
    if config.policy == "mlp" and not is_mlp(module):
        return "not an MLP projection"
    if config.granularity == "layer" and module.layer is None:
        return "outside the layers; placement.granularity is layer"
    return None


def is_attention(module: Projection) -> bool:
    """Tell by its path or type whether a projection belongs to an attention block."""
    return _ATTENTION.search(module.fqn) is not None or module.type in _ATTENTION_TYPES


def is_mlp(module: Projection) -> bool:
    """Tell by its path or type whether a projection belongs to a feed-forward block, routed experts included."""
    return not is_attention(module) and (_MLP.search(module.fqn) is not None or module.type in _MLP_TYPES)


def _reason_per_type(modules: Iterable[ModuleScore], reasons: dict[str, str]) -> list[tuple[str, str]]:
    return sorted({(module.type, reasons[module.fqn]) for module in modules})


def _check_names(modules: Sequence[ModuleScore], config: PlacementConfig, left_out: Sequence[LeftOut]) -> None:
    projections: list[Projection] = [*modules, *left_out]
    types = {projection.type for projection in projections}
    optional = set(PlacementConfig.model_validate({}).exclude)
    entries = [("exclude", entry) for entry in config.exclude if entry not in optional]
    for field, entry in entries + [("include", entry) for entry in config.include]:
        if not any(matches(projection, entry) for projection in projections):
            raise PlacementError(f"placement.{field} '{entry}' matches no module of the model. {suggest(entry, types)}")
    for entry in config.rank_pattern:
        if entry not in types and all(projection.fqn != entry for projection in projections):
            raise PlacementError(
                f"placement.rank_pattern '{entry}' is no type or path of the model. {suggest(entry, types)}"
            )
