"""Which modules a policy may choose from, grouped into the units it chooses between, and why the others are out."""

# M scored modules, U units (types, layers or modules), N units or modules in some order, b rows of NFN values

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plop_dist.choose.bootstrap import NUM_RESAMPLES, draw_counts, group_means, resampled_nfn, round_scores
from plop_dist.choose.policy import Rule, policy_of, rank_function
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError, suggest
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.names import NameList, natural_key
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import LeftOut, ModuleScore, Projection

# Input and output embeddings under names other than lm_head, which the default `exclude` covers.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "embed_out", "wte", "wpe", "word_embeddings", "tok_embeddings"})
# What steers tokens to experts. Frameworks leave it without an adapter, and so does a policy unless `include` names it.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# DeepSeek V3.2's selection of tokens: its output is a top-k.
_INDEXER = "indexer"
# What a module is chosen with, by placement.granularity.
_UNIT: dict[str, Callable[[ModuleScore], str]] = {
    "type": lambda module: module.type,
    "layer": lambda module: f"layer.{module.layer}",
    "module": lambda module: module.fqn,
}


@dataclass(frozen=True, eq=False)
class Candidates:
    """The units a policy chooses between, in natural order of their names.

    unit_M: (M,) int64, the unit of each scored module, -1 for one that may not be chosen; reasons: why not, by path.
    """

    eligible: Eligible
    units: tuple[str, ...]
    unit_M: np.ndarray
    reasons: dict[str, str]
    config: PlacementConfig

    @property
    def modules(self) -> tuple[ModuleScore, ...]:
        """Every scored module, whether or not it may be chosen."""
        return self.eligible.modules

    @cached_property
    def unit_nfn(self) -> np.ndarray:
        """The NFN of every unit: (U,), float64."""
        return self.values(self.eligible.nfn[None])[0]

    def values(self, nfn_bM: np.ndarray) -> np.ndarray:
        """Return the mean NFN of each unit: (b, U), float64, NaN without a token.

        nfn_bM: (b, M), in the order of `modules`. Rounded, so that equal scores tie.
        """
        return round_scores(group_means(nfn_bM, self.unit_M, len(self.units)))

    def resampled(
        self, samples: SampleTotals, sample_size: int | None = None, num_resamples: int = NUM_RESAMPLES, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield the mean NFN of each unit in bootstrap resamples, block by block: (b, U), as `values` gives them.

        sample_size: draw so many samples per resample instead of all, to see what fewer would have given. Raises
        ScoresError if `samples` lacks a module.
        """
        yield from self.weighted(samples, draw_counts(len(samples.sample_ids), num_resamples, seed, sample_size))

    def weighted(self, samples: SampleTotals, counts_BS: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the mean NFN of each unit where the samples count so often, block by block: (b, U)."""
        # In the order of their units, so that nothing is put in order again in every block.
        members = self._members_by_unit
        unit_N = self.unit_M[members]
        for nfn_bN in resampled_nfn([self.modules[index] for index in members.tolist()], samples, counts_BS):
            yield round_scores(group_means(nfn_bN, unit_N, len(self.units)))

    def share_of(
        self, chosen_U: np.ndarray, rule: Rule, samples: SampleTotals, sample_size: int | None = None
    ) -> float:
        """Return in which share of resamples a rule makes this choice. Arguments as of `resampled`."""
        same = [(rule(values_bU) == chosen_U).all(axis=1) for values_bU in self.resampled(samples, sample_size)]
        return float(np.concatenate(same).mean())

    @cached_property
    def num_modules(self) -> np.ndarray:
        """How many modules each unit has: (U,), int64."""
        return np.diff(self._starts)

    @cached_property
    def sizes(self) -> AdapterSizes:
        """The parameters of adapters on the scored modules, at the ranks of the configuration."""
        return AdapterSizes(self.modules, rank_function(self.config), self.eligible.left_out)

    @cached_property
    def costs(self) -> np.ndarray:
        """The trainable parameters of adapters on each unit alone: (U,), int64."""
        return self.sizes.totals(self.unit_M, len(self.units))

    def cost_of(self, units: np.ndarray) -> int:
        """Return the trainable parameters of adapters on several units. units: (N,), their indices."""
        running = self.running_costs(units)
        return int(running[-1]) if len(running) else 0

    def running_costs(self, units: np.ndarray, set_N: np.ndarray | None = None) -> np.ndarray:
        """Return the trainable parameters of the first, the first two, ... of these units together: (N,), int64.

        set_N: (N,), ascending, where they belong to several sets that are counted each by itself.
        """
        starts, stops = self._starts[units], self._starts[units + 1]
        num = stops - starts
        ends = np.cumsum(num)
        # Where each unit's modules lie among all units' modules, one unit after the other.
        position_N = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - num), num)
        of_sets = None if set_N is None else np.repeat(set_N, num)
        return self.sizes.running(self._members_by_unit[position_N], of_sets)[ends - 1]

    def sharing(self, units: np.ndarray) -> list[np.ndarray]:
        """Return which of these units (positions in `units`) have parts of the same fused linears, directly or not."""
        groups: list[tuple[set[str], list[int]]] = []
        for position, unit in enumerate(units.tolist()):
            holders, together = set(self._holders[unit]), [position]
            apart = [group for group in groups if holders.isdisjoint(group[0])]
            for others, positions in (group for group in groups if not holders.isdisjoint(group[0])):
                holders |= others
                together += positions
            groups = [*apart, (holders, together)]
        return [np.array(sorted(together)) for _, together in groups]

    def chosen_modules(self, chosen_U: np.ndarray) -> np.ndarray:
        """Return which modules belong to the chosen units: (M,), bool. chosen_U: (U,), bool."""
        return (self.unit_M >= 0) & chosen_U[self.unit_M]

    def members(self, chosen_U: np.ndarray) -> tuple[ModuleScore, ...]:
        """Return the modules of the chosen units, in natural order. chosen_U: (U,), bool."""
        members = [self.modules[index] for index in np.flatnonzero(self.chosen_modules(chosen_U)).tolist()]
        return tuple(sorted(members, key=lambda module: natural_key(module.fqn)))

    @cached_property
    def _holders(self) -> list[set[str]]:
        """What holds the weights of each unit's modules."""
        holders: list[set[str]] = [set() for _ in self.units]
        for module, unit in zip(self.modules, self.unit_M.tolist(), strict=True):
            if unit >= 0:
                holders[unit].add(module.holder)
        return holders

    @cached_property
    def _members_by_unit(self) -> np.ndarray:
        """The indices of the modules that may be chosen, unit by unit."""
        order = np.argsort(self.unit_M, kind="stable")
        return order[self.unit_M[order] >= 0]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each unit begins in _members_by_unit, and the end of the last one: (U + 1,)."""
        return np.searchsorted(self.unit_M[self._members_by_unit], np.arange(len(self.units) + 1))


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
        return Candidates(self, units, unit_M, reasons, config)

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
    exclude, include = NameList(config.exclude), NameList(config.include)
    has_experts = any(projection.type.startswith("experts.") for projection in projections)
    reasons = {}
    for module in modules:
        reason = _reason_out(module, config, exclude, include, has_experts)
        if reason:
            reasons[module.fqn] = reason
    return Eligible(tuple(modules), tuple(left_out), reasons)


def _reason_out(
    module: ModuleScore, config: PlacementConfig, exclude: NameList, include: NameList, has_experts: bool
) -> str | None:
    if module.type in _EMBEDDINGS:
        return "embeddings never get an adapter"
    if module.type.startswith("experts.") and not config.experts:
        return "routed expert; placement.experts is false"
    entry = exclude.first(module.type, module.fqn)
    if entry is not None:
        return f"excluded by '{entry}'"
    is_included = include.first(module.type, module.fqn) is not None
    if config.include and not is_included:
        return "not in placement.include"
    if is_included:
        return None
    parts = module.fqn.split(".")
    # GraniteMoE's and Hunyuan's are linears inside a module of that name (router.layer, gate.wg).
    is_router = module.storage == "router" or (has_experts and not _ROUTERS.isdisjoint(parts[-2:]))
    if is_router:
        return "router of experts; only placement.include chooses it"
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
