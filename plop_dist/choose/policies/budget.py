"""What fits a budget of trainable parameters: the best set at the given rank, or the k lowest at the highest rank."""

# U units, b rows of values, P units with a positive gap, C components, N units in the order in which they are taken

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from plop_dist.choose.policies.lowest_highest import LowestK
from plop_dist.choose.units import Candidates, Rule, rank_function
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ConfigError, PlacementError
from plop_dist.values.scores import TypeScore

_EXACT_UNITS = 12  # 2^12 subsets: instant; beyond, the budget is filled greedily
_EXACT_CALLS = 8  # 2^8 subsets, where a subset costs other than its units apart
_SPARE_UNITS = 64  # looked at beyond those that can be taken, for small ones to fill what is left of the budget


class Budget(LowestK):
    """At most placement.max_trainable_parameters; with fit=rank the policy lowest_k, at the rank that fits."""

    name = "budget"
    sets_rank = True
    summary = "what fits max_trainable_parameters: the best set at the given rank, or (fit=rank) the k lowest"
    parameters = ("max_trainable_parameters", "fit", "k")
    is_yardstick = False

    def check(self, config: PlacementConfig) -> None:
        """Raise ConfigError without a budget."""
        if config.max_trainable_parameters is None:
            raise ConfigError("placement.policy=budget needs placement.max_trainable_parameters.")

    def rule(self, candidates: Candidates, config: PlacementConfig) -> Rule:
        """Return the search for the set, or the k lowest. Raises PlacementError when nothing fits, or as lowest_k."""
        if config.fit == "rank":
            return super().rule(candidates, config)
        return BudgetRule(candidates, config.rank, _limit(config))

    def rank(self, candidates: Candidates, chosen_U: np.ndarray, config: PlacementConfig) -> int:
        """Return the highest common rank that fits, with fit=rank. Raises PlacementError when rank 1 does not fit."""
        return config.rank if config.fit == "set" else highest_fitting_rank(candidates, chosen_U, config)

    def sentence(self, config: PlacementConfig) -> str:
        """Return what is chosen, with the limit."""
        limit = f"{_limit(config):,} parameters"
        if config.fit == "rank":
            return f"{super().sentence(config)}, at the highest rank that fits {limit}"
        return f"the {config.granularity}s with the largest total NFN gap to the mean that fit {limit}"

    def reasons(
        self, candidates: Candidates, values_U: np.ndarray, chosen_U: np.ndarray, config: PlacementConfig
    ) -> Callable[[int], str]:
        """Return each unit's gap and price, or with fit=rank its place in the order."""
        if config.fit == "rank":
            return super().reasons(candidates, values_U, chosen_U, config)
        cost_U, mean, limit = candidates.costs, np.nanmean(values_U), _limit(config)

        def reason(unit: int) -> str:
            needs = int(cost_U[unit])
            if chosen_U[unit]:
                return f"gap {mean - values_U[unit]:+.4f} to the mean {mean:.4f} for {needs:,} parameters"
            if needs > limit:
                return f"its {needs:,} parameters alone exceed the limit of {limit:,}"
            if values_U[unit] >= mean:
                return f"not below the candidates' mean {mean:.4f}"
            return f"its {needs:,} parameters do not fit beside the set with the larger total gap"

        return reason

    def doubt(self, entries: Sequence[TypeScore], chosen: Collection[str], config: PlacementConfig) -> str | None:
        """Return that the intervals at the cut overlap, where there is one: a set follows costs as well."""
        return super().doubt(entries, chosen, config) if config.fit == "rank" else None


class BudgetRule:
    """The set with the largest total NFN gap among those whose adapters fit the budget.

    The gap of a unit is how far its NFN lies below the mean of all candidates; units above the mean are never chosen
    while one below it fits. For a given number of units the largest total gap is the lowest total NFN, so the choice
    beats every same-size alternative that fits. The search over sets is exact up to 12 units below the mean, which
    covers every choice between types; beyond (layers, modules) units are taken lowest NFN first, skipping those that
    no longer fit. Ties go to fewer parameters, then to the first names.
    """

    def __init__(self, candidates: Candidates, rank: int, limit: int) -> None:
        self._candidates = candidates
        self._limit = limit
        cost_U = candidates.costs
        self._fitting = np.flatnonzero(cost_U <= limit)
        if not len(self._fitting):
            cheapest = int(cost_U.argmin())
            raise PlacementError(
                f"placement.max_trainable_parameters is {limit:,}, but the smallest adapter, on "
                f"{candidates.units[cheapest]}, has {cost_U[cheapest]:,} parameters at rank {rank}; raise the limit or "
                "lower placement.rank."
            )
        # Projections fused into one linear share one A matrix: then a set costs other than its members apart.
        self._is_additive = int(cost_U.sum()) == candidates.cost_of(np.arange(len(cost_U)))
        self._most_exact = _EXACT_UNITS if self._is_additive else _EXACT_CALLS
        self._cost_F = cost_U[self._fitting]
        self._cheap_first = np.argsort(self._cost_F, kind="stable")
        self._rising_cost = self._cost_F[self._cheap_first]
        most_taken = int(np.searchsorted(np.cumsum(self._rising_cost), limit, side="right"))
        self._num_first = max(most_taken, self._most_exact) + _SPARE_UNITS
        self._subsets: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, values_bU: np.ndarray) -> np.ndarray:
        """Return the choice for each row of unit NFNs: (b, U), bool."""
        values_bF = values_bU if len(self._fitting) == values_bU.shape[1] else values_bU[:, self._fitting]
        means = np.nanmean(values_bU, axis=1)
        chosen_bU = np.zeros(values_bU.shape, dtype=bool)
        filled: dict[int, np.ndarray] = {}
        for row, (values_F, mean) in enumerate(zip(values_bF, means, strict=True)):
            first, last_value = self._first_positive(values_F, mean)
            if len(first) > self._most_exact:
                filled[row] = self._fitting[self._fill(values_F, mean, first, last_value)]
            else:
                chosen_bU[row, self._fitting[self._best_set(values_F, mean, np.sort(first))]] = True
        if filled:
            row_N = np.repeat(list(filled), [len(taken) for taken in filled.values()])
            unit_N = np.concatenate(list(filled.values()))
            fits_N = self._fit_together(unit_N, row_N)
            chosen_bU[row_N[fits_N], unit_N[fits_N]] = True
        return chosen_bU

    def _best_set(self, values_F: np.ndarray, mean: float, positive: np.ndarray) -> np.ndarray:
        """Return the set with the largest total gap, of the few units that lie below the mean, or the nearest to it."""
        if not len(positive):
            known = np.flatnonzero(~np.isnan(values_F))
            return known[_gap(values_F[known], mean).argmax()][None] if len(known) else known
        subsets, costs = self._fitting_subsets(positive)
        total_gap = np.round(subsets @ _gap(values_F[positive], mean), 9)
        best = np.flatnonzero(total_gap == total_gap.max())
        return positive[subsets[best[costs[best].argmin()]]]

    def _first_positive(self, values_F: np.ndarray, mean: float) -> tuple[np.ndarray, float]:
        """Return the units below the mean, lowest NFN first, and the NFN up to which these are all of them.

        That is as far as sets are searched exactly or the budget can reach, and a little further: of tens of thousands
        only these are put in order.
        """
        last_value = np.inf
        if self._num_first < len(values_F):
            last_value = np.partition(values_F, self._num_first)[self._num_first]
            last_value = np.inf if np.isnan(last_value) else last_value
        return _lowest_first(np.flatnonzero(values_F <= last_value), values_F, mean), last_value

    def _fill(self, values_F: np.ndarray, mean: float, first: np.ndarray, last_value: float) -> np.ndarray:
        """Take units lowest NFN first, skipping each that no longer fits."""
        taken, remaining = self._take(first, self._limit)
        cheap = self._cheap_first[: np.searchsorted(self._rising_cost, remaining, side="right")]
        beyond = np.sort(cheap[values_F[cheap] > last_value])
        if len(beyond):
            taken = np.append(taken, self._take(_lowest_first(beyond, values_F, mean), remaining)[0])
        return taken

    def _fit_together(self, unit_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
        """Tell which of the units taken in each row, in the order in which they were, fit the budget together: (N,).

        With unequal ranks, or the gates of some experts and the up projections of others, what is fused costs more than
        its parts: then the last ones taken are left again, until the rest fits.
        """
        if self._is_additive:
            return np.ones(len(unit_N), dtype=bool)
        fits = np.flatnonzero(self._candidates.running_costs(unit_N, row_N) <= self._limit)
        last = np.full(int(row_N[-1]) + 1, -1)
        np.maximum.at(last, row_N[fits], fits)
        return np.arange(len(row_N)) <= last[row_N]

    def _take(self, ordered: np.ndarray, remaining: int) -> tuple[np.ndarray, int]:
        """Return the units that are taken in this order, and what is left of the budget."""
        taken = []
        ordered = ordered[self._cost_F[ordered] <= remaining]
        while len(ordered):
            spent = np.cumsum(self._cost_F[ordered])
            num_fitting = int(np.searchsorted(spent, remaining, side="right"))
            taken.append(ordered[:num_fitting])
            remaining -= int(spent[num_fitting - 1])
            ordered = ordered[num_fitting + 1 :]
            ordered = ordered[self._cost_F[ordered] <= remaining]
        return np.concatenate(taken or [ordered]), remaining

    def _fitting_subsets(self, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Kept per set of units, because resamples mostly agree on which ones lie below the mean.
        key = positive.tobytes()
        if key not in self._subsets:
            num = len(positive)
            subsets = (np.arange(1, 2**num)[:, None] >> np.arange(num)) & 1 == 1
            costs = subsets @ self._cost_F[positive] if self._is_additive else self._count(subsets, positive)
            fits = costs <= self._limit
            self._subsets[key] = subsets[fits], costs[fits]
        return self._subsets[key]

    def _count(self, subsets: np.ndarray, positive: np.ndarray) -> np.ndarray:
        """Return what each subset costs, counting those units together that have parts of the same linears."""
        units = self._fitting[positive]
        total = np.zeros(len(subsets), dtype=np.int64)
        for together in self._candidates.sharing(units):
            parts, index = np.unique(subsets[:, together], axis=0, return_inverse=True)
            costs = [self._candidates.cost_of(units[together][part]) for part in parts]
            total += np.array(costs)[index.reshape(-1)]
        return total


def highest_fitting_rank(candidates: Candidates, chosen_U: np.ndarray, config: PlacementConfig) -> int:
    """Return the highest common rank at which adapters on the chosen units fit; rank_pattern stays as given.

    Raises PlacementError when rank 1 does not fit.
    """
    limit, modules = _limit(config), candidates.members(chosen_U)
    # No update of a weight has a higher rank than its smaller side.
    ceiling = max(min(module.in_features, module.out_features) for module in modules)
    chosen_M = candidates.chosen_modules(chosen_U)

    def count(rank: int) -> int:
        rank_of = rank_function(config.model_copy(update={"rank": rank}))
        return candidates.sizes.with_ranks(rank_of).total(chosen_M)

    if count(1) > limit:
        raise PlacementError(
            f"placement.max_trainable_parameters is {limit:,}, but rank 1 on the chosen modules has {count(1):,} "
            "parameters; raise the limit, lower placement.k, or use placement.fit=set."
        )
    low, high = 1, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle - 1)
    return low


def _gap(values: np.ndarray, mean: float) -> np.ndarray:
    return np.round(mean - values, 12)


def _lowest_first(units: np.ndarray, values: np.ndarray, mean: float) -> np.ndarray:
    """Return those of the units, ascending indices, that lie below the mean: largest gap first, ties by index."""
    gap = _gap(values[units], mean)
    units, gap = units[gap > 0], -gap[gap > 0]
    order = np.argsort(gap)
    # Sorting that keeps ties in order takes four times as long, and there are hardly ever any.
    if (np.diff(gap[order]) == 0).any():
        order = np.argsort(gap, kind="stable")
    return units[order]


def _limit(config: PlacementConfig) -> int:
    assert config.max_trainable_parameters is not None, "the configuration is checked"
    return config.max_trainable_parameters


BUDGET = Budget()
