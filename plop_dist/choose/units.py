"""The units that a policy chooses between: their NFN, also in resamples, and what adapters on them cost."""

# M scored modules, U units (types, layers or modules), N units or modules in some order, b rows of NFN values

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plop_dist.choose.bootstrap import NUM_RESAMPLES, draw_counts, group_means, resampled_nfn, round_scores
from plop_dist.config.schema import PlacementConfig
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.names import natural_key
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import LeftOut, ModuleScore, Projection

# From the NFN of each unit, (b, U) float64, NaN where a unit has no token, to what is chosen: (b, U), bool.
Rule = Callable[[np.ndarray], np.ndarray]
RankOf = Callable[[Projection], int]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The units a policy chooses between, in natural order of their names.

    modules: every scored module, whether or not it may be chosen; nfn_M: (M,) float64; left_out: the projections
    without a score; unit_M: (M,) int64, the unit of each scored module, -1 for one that may not be chosen; reasons: why
    not, by path; sizes_at_any_rank: AdapterSizes of modules and left_out, at whatever ranks.
    """

    modules: tuple[ModuleScore, ...]
    nfn_M: np.ndarray
    left_out: tuple[LeftOut, ...]
    units: tuple[str, ...]
    unit_M: np.ndarray
    reasons: dict[str, str]
    config: PlacementConfig
    sizes_at_any_rank: Callable[[], AdapterSizes]

    @cached_property
    def unit_nfn(self) -> np.ndarray:
        """The NFN of every unit: (U,), float64."""
        return self.values(self.nfn_M[None])[0]

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
        return self.sizes_at_any_rank().with_ranks(rank_function(self.config))

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


def rank_function(config: PlacementConfig) -> RankOf:
    """Return the LoRA rank of each projection under a configuration: its path's rank, its type's, or the common one."""
    pattern, rank = config.rank_pattern, config.rank
    if not pattern:
        return lambda projection: rank
    return lambda projection: pattern.get(projection.fqn, pattern.get(projection.type, rank))
