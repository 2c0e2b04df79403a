"""Which units each policy chooses, given their NFN: one rule per policy, the same for the scores and every resample."""

# U units, b rows of values, P units with a positive gap

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plop_dist.choose.bootstrap import PolicyFunction
from plop_dist.choose.candidates import Candidates
from plop_dist.config.loading import parse_section
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.scores import ModuleScore, Projection

_EXACT_UNITS = 12  # 2^12 subsets: instant; beyond, the budget is filled greedily
_EXACT_CALLS = 8  # 2^8 subsets, where each subset's parameters must be counted by themselves

Cost = Callable[[Sequence[int] | np.ndarray], int]


def resolve_policy(policy: PlacementConfig | str | None = None, **options: Any) -> PlacementConfig:
    """Return a validated placement configuration: `policy` with `options` laid over it.

    Raises ConfigError naming the field, the value and the expectation, with a suggestion for an unknown field.
    """
    if isinstance(policy, PlacementConfig):
        tree = {**policy.model_dump(), **options}
    else:
        tree = options if policy is None else {**options, "policy": policy}
    return parse_section(PlacementConfig, tree, source="place options")


def build_policy(candidates: Candidates, config: PlacementConfig) -> PolicyFunction:
    """Return the configured policy: NFN (b, M), in the order of candidates.modules, to choices (b, U), bool.

    Ties are broken by the unit's natural name. A unit without a score in a row is never chosen there.
    Raises PlacementError when k exceeds the number of units or nothing fits the budget.
    """
    rule = _rule(candidates, config)
    return lambda nfn_bM: rule(candidates.values(nfn_bM))


def _rule(candidates: Candidates, config: PlacementConfig) -> Callable[[np.ndarray], np.ndarray]:
    if config.policy in ("attention", "mlp", "all"):
        return lambda values_bU: np.ones(values_bU.shape, dtype=bool)
    if config.policy == "threshold":
        threshold = config.threshold
        assert threshold is not None, "the configuration is validated"
        return lambda values_bU: values_bU < threshold
    if config.policy == "budget" and config.fit == "set":
        limit = config.max_trainable_parameters
        assert limit is not None, "the configuration is validated"
        return BudgetRule(candidates, config, limit)
    _check_k(candidates, config)
    sign = -1.0 if config.policy == "highest_k" else 1.0
    return lambda values_bU: choose_first(sign * values_bU, config.k)


def choose_first(values_bU: np.ndarray, k: int) -> np.ndarray:
    """Return the k units with the lowest value in each row: (b, U), bool; ties go to the first unit, NaN to nobody."""
    order = np.argsort(values_bU, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(values_bU.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & ~np.isnan(values_bU)


def _check_k(candidates: Candidates, config: PlacementConfig) -> None:
    num_units = len(candidates.units)
    if config.k > num_units:
        listed = ", ".join(candidates.units[:20]) + (", ..." if num_units > 20 else "")
        raise PlacementError(
            f"placement.k is {config.k}, but there are only {num_units} candidate {config.granularity}s: {listed}; "
            f"set placement.k to {num_units} or less."
        )


class BudgetRule:
    """The set with the largest total NFN gap among those whose adapters fit the budget.

    The gap of a unit is how far its NFN lies below the mean of all candidates; units above the mean are never chosen
    while one below it fits. For a given number of units the largest total gap is the lowest total NFN, so the choice
    beats every same-size alternative that fits. The search over sets is exact up to 12 units below the mean, which
    covers every choice between types; beyond (layers, modules) units are taken lowest NFN first, skipping those that
    no longer fit. Ties go to fewer parameters, then to the first names.
    """

    def __init__(self, candidates: Candidates, config: PlacementConfig, limit: int) -> None:
        self._limit = limit
        self._cost = cost_function(candidates, rank_function(config))
        num_units = len(candidates.units)
        self._cost_U = np.array([self._cost([unit]) for unit in range(num_units)], dtype=np.int64)
        # Projections fused into one linear share one A matrix: then a set costs other than its members apart.
        self._is_additive = int(self._cost_U.sum()) == self._cost(range(num_units))
        self._subsets: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        if (self._cost_U > limit).all():
            cheapest = int(self._cost_U.argmin())
            raise PlacementError(
                f"placement.max_trainable_parameters is {limit:,}, but the smallest adapter, on "
                f"{candidates.units[cheapest]}, has {self._cost_U[cheapest]:,} parameters at rank {config.rank}; raise "
                "the limit or lower placement.rank."
            )

    def __call__(self, values_bU: np.ndarray) -> np.ndarray:
        """Return the choice for each row of unit NFNs: (b, U), bool."""
        return np.array([self._choose(values_U) for values_U in values_bU])

    def _choose(self, values_U: np.ndarray) -> np.ndarray:
        gap_U = np.round(np.nanmean(values_U) - values_U, 12)
        fits_U = (self._cost_U <= self._limit) & ~np.isnan(values_U)
        positive = np.flatnonzero(fits_U & (gap_U > 0))
        chosen_U = np.zeros(len(values_U), dtype=bool)
        if not len(positive):
            if fits_U.any():
                chosen_U[np.argmax(np.where(fits_U, gap_U, -np.inf))] = True
            return chosen_U
        if len(positive) <= (_EXACT_UNITS if self._is_additive else _EXACT_CALLS):
            subsets, costs = self._fitting_subsets(positive)
            total_gap = np.round(subsets @ gap_U[positive], 9)
            best = np.flatnonzero(total_gap == total_gap.max())
            chosen_U[positive[subsets[best[costs[best].argmin()]]]] = True
            return chosen_U
        return self._fill(chosen_U, positive[np.argsort(-gap_U[positive], kind="stable")])

    def _fitting_subsets(self, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Kept per set of units, because resamples mostly agree on which ones lie below the mean.
        key = positive.tobytes()
        if key not in self._subsets:
            num = len(positive)
            subsets = (np.arange(1, 2**num)[:, None] >> np.arange(num)) & 1 == 1
            costs = subsets @ self._cost_U[positive] if self._is_additive else self._count(subsets, positive)
            fits = costs <= self._limit
            self._subsets[key] = subsets[fits], costs[fits]
        return self._subsets[key]

    def _count(self, subsets: np.ndarray, positive: np.ndarray) -> np.ndarray:
        return np.array([self._cost(positive[subset]) for subset in subsets])

    def _fill(self, chosen_U: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        """Take units in this order, skipping each that no longer fits."""
        taken: list[int] = []
        remaining = self._limit
        while len(ordered):
            spent = np.cumsum(self._cost_U[ordered])
            num_fitting = int(np.searchsorted(spent, remaining, side="right"))
            taken += ordered[:num_fitting].tolist()
            remaining -= int(spent[num_fitting - 1]) if num_fitting else 0
            ordered = ordered[num_fitting + 1 :]
            ordered = ordered[self._cost_U[ordered] <= remaining]
        # With unequal ranks, a fused linear taken whole costs more than its parts: every part then gets the highest.
        while not self._is_additive and self._cost(taken) > self._limit:
            taken.pop()
        chosen_U[taken] = True
        return chosen_U


def rank_function(config: PlacementConfig) -> Callable[[Projection], int]:
    """Return the LoRA rank of each projection under a configuration: its path's rank, its type's, or the common one."""
    pattern = config.rank_pattern
    return lambda projection: pattern.get(projection.fqn, pattern.get(projection.type, config.rank))


def cost_function(candidates: Candidates, rank_of: Callable[[Projection], int]) -> Cost:
    """Return the function from indices of units to the trainable parameters of adapters on all of them."""
    members: list[list[ModuleScore]] = [[] for _ in candidates.units]
    for module, unit in zip(candidates.modules, candidates.unit_M, strict=True):
        if unit >= 0:
            members[unit].append(module)
    return lambda units: num_trainable_parameters(
        [module for unit in units for module in members[unit]], rank_of, candidates.left_out
    )


def highest_fitting_rank(
    modules: Sequence[ModuleScore], config: PlacementConfig, left_out: Sequence[Projection] = ()
) -> int:
    """Return the highest common rank at which adapters on `modules` fit the budget; rank_pattern stays as given.

    Raises PlacementError when rank 1 does not fit.
    """
    limit = config.max_trainable_parameters
    assert limit is not None, "the configuration is validated"
    # No update of a weight has a higher rank than its smaller side.
    ceiling = max(min(module.in_features, module.out_features) for module in modules)

    def count(rank: int) -> int:
        return num_trainable_parameters(modules, rank_function(config.model_copy(update={"rank": rank})), left_out)

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
