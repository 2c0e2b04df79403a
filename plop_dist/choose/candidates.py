"""Which modules a policy may choose from, and why the others are out."""

# M scored modules

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plop_dist.choose.policy import policy_of
from plop_dist.choose.units import Candidates
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError, suggest
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.names import NameList, natural_key
from plop_dist.values.scores import LeftOut, ModuleScore, Projection

# Input and output embeddings under names other than lm_head, which the default `exclude` covers.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "embed_out", "wte", "wpe", "word_embeddings", "tok_embeddings"})
# What steers tokens to experts, where the backend does not say so (role). Frameworks leave it without an adapter, and
# so does a policy unless `include` names it.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# DeepSeek V3.2's selection of tokens: its output is a top-k.
_INDEXER = "indexer"
# What a module is chosen with, by placement.granularity.
_UNIT: dict[str, Callable[[ModuleScore], str]] = {
    "type": lambda module: module.type,
    "layer": lambda module: f"{'' if module.part == 'language' else f'{module.part}.'}layer.{module.layer}",
    "module": lambda module: module.fqn,
}


@dataclass(frozen=True, eq=False)
class Eligible:
    """What the section `placement` leaves to every policy.

    reasons: why other modules are out, by path; left_out: the projections without a score, which are never chosen but
    may share a fused weight with chosen ones.
    """

    modules: tuple[ModuleScore, ...]
    left_out: tuple[LeftOut, ...]
    reasons: dict[str, str]

    @cached_property
    def nfn(self) -> np.ndarray:
        """The NFN of every scored module: (M,), float64."""
        return np.array([module.nfn for module in self.modules])

    def candidates(self, config: PlacementConfig) -> Candidates:
        """Return what the policy that `config` names chooses between, in units of its granularity.

        Raises PlacementError when nothing is left.
        """
        policy = policy_of(config)
        reasons = dict(self.reasons)
        members = []
        for index in self._inside:
            module = self.modules[index]
            reason = policy.reason_out(module, config)
            if reason is None and config.granularity == "layer" and module.layer is None:
                reason = "outside the layers; placement.granularity is layer"
            if reason is None:
                members.append(index)
            else:
                reasons[module.fqn] = reason
        if not members:
            texts = "; ".join(
                f"{name}: {text}" for name, text in sorted({(m.type, reasons[m.fqn]) for m in self.modules})
            )
            raise PlacementError(
                f"No module is left to choose from ({texts}); relax placement.exclude, include or policy."
            )
        names = [_UNIT[config.granularity](self.modules[index]) for index in members]
        units = tuple(sorted(set(names), key=natural_key))
        position = {name: index for index, name in enumerate(units)}
        unit_M = np.full(len(self.modules), -1, dtype=np.int64)
        unit_M[members] = [position[name] for name in names]
        return Candidates(self.modules, self.nfn, self.left_out, units, unit_M, reasons, config, lambda: self._sizes)

    @cached_property
    def _sizes(self) -> AdapterSizes:
        # Which projections share a weight is found once, for every policy and rank.
        return AdapterSizes(self.modules, lambda _: 1, self.left_out)

    @cached_property
    def _inside(self) -> list[int]:
        return [index for index, module in enumerate(self.modules) if module.fqn not in self.reasons]


def find_candidates(
    modules: Sequence[ModuleScore], config: PlacementConfig, left_out: Sequence[LeftOut] = ()
) -> Candidates:
    """Return what `config` lets a policy choose between.

    Raises PlacementError when an entry of exclude, include or rank_pattern matches no module of the model (entries
    of the default `exclude` may), or when nothing is left.
    """
    return find_eligible(modules, config, left_out).candidates(config)


def find_eligible(
    modules: Sequence[ModuleScore], config: PlacementConfig, left_out: Sequence[LeftOut] = ()
) -> Eligible:
    """Return what `config` leaves to every policy. Raises PlacementError as find_candidates does for its entries."""
    projections: list[Projection] = [*modules, *left_out]
    _check_names(projections, config)
    exclude, include = NameList(config.exclude), _Include(config.include, projections)
    has_experts = any(projection.type.startswith("experts.") for projection in projections)
    reasons = {}
    for module in modules:
        reason = _reason_out(module, config, exclude, include, has_experts)
        if reason:
            reasons[module.fqn] = reason
    return Eligible(tuple(modules), tuple(left_out), reasons)


class _Include:
    """What placement.include names.

    An entry that names modules of the language model means these alone: `q_proj` is no vision tower's, whose path ends
    in it as well. Towers and projectors are named by their types (`vision.q_proj`), or by paths of theirs.
    """

    def __init__(self, entries: Sequence[str], projections: Sequence[Projection]) -> None:
        self._list = NameList(entries)
        self._of_language: set[str] = set()
        if entries and any(projection.part != "language" for projection in projections):
            for projection in projections:
                if projection.part == "language":
                    self._of_language |= self._list.all(projection.type, projection.fqn)

    def names(self, module: ModuleScore) -> bool:
        if module.part == "language":
            return self._list.first(module.type, module.fqn) is not None
        return bool(self._list.all(module.type, module.fqn) - self._of_language) if self._list.entries else False


def _reason_out(
    module: ModuleScore, config: PlacementConfig, exclude: NameList, include: _Include, has_experts: bool
) -> str | None:
    if module.type in _EMBEDDINGS:
        return "embeddings never get an adapter"
    if module.type.startswith("experts.") and not config.experts:
        return "routed expert; placement.experts is false"
    entry = exclude.first(module.type, module.fqn)
    if entry is not None:
        return f"excluded by '{entry}'"
    is_included = include.names(module)
    if module.part != "language" and not is_included:
        return f"{module.part} part; only placement.include chooses it"
    if config.include and not is_included:
        return "not in placement.include"
    if is_included:
        return None
    parts = module.fqn.split(".")
    # GraniteMoE's and Hunyuan's are linears inside a module of that name (router.layer, gate.wg).
    is_named = has_experts and not _ROUTERS.isdisjoint(parts[-2:])
    if module.role == "router" or module.storage == "router" or is_named:
        return "router of experts; only placement.include chooses it"
    if module.role == "kernel":
        return "read by a kernel past any adapter, which PEFT refuses; only placement.include chooses it"
    if _INDEXER in parts:
        return "picks tokens for sparse attention, where no gradient reaches it; only placement.include chooses it"
    return None


def _check_names(projections: Sequence[Projection], config: PlacementConfig) -> None:
    types = {projection.type for projection in projections}
    optional = set(PlacementConfig.model_validate({}).exclude)
    for field, entries in (("exclude", [e for e in config.exclude if e not in optional]), ("include", config.include)):
        names = NameList(entries)
        used: set[str] = set()
        for projection in projections if entries else ():
            used |= names.all(projection.type, projection.fqn)
        unused = [entry for entry in names.entries if entry not in used]
        if unused:
            raise PlacementError(
                f"placement.{field} '{unused[0]}' matches no module of the model. {suggest(unused[0], types)}"
            )
    known = types.union(projection.fqn for projection in projections) if config.rank_pattern else types
    for entry in config.rank_pattern:
        if entry not in known:
            raise PlacementError(
                f"placement.rank_pattern '{entry}' is no type or path of the model. {suggest(entry, types)}"
            )
