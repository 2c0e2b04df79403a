"""The k units with the lowest NFN, which is the paper's choice, and those with the highest, its negative control."""

# U units, b rows of values

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from plop_dist.choose.policy import Policy
from plop_dist.choose.units import Candidates, Rule
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.scores import TypeScore


class LowestK(Policy):
    """placement.k units, lowest NFN first."""

    name = "lowest_k"
    summary = "the k types (layers, modules) with the lowest NFN: the choice of the paper"
    parameters = ("k",)
    is_yardstick = True
    _word = "lowest"

    def rule(self, candidates: Candidates, config: PlacementConfig) -> Rule:
        """Return the first k in the policy's order. Raises PlacementError when k exceeds the number of units."""
        num_units = len(candidates.units)
        if config.k > num_units:
            listed = ", ".join(candidates.units[:20]) + (", ..." if num_units > 20 else "")
            raise PlacementError(
                f"placement.k is {config.k}, but there are only {num_units} candidate {config.granularity}s: {listed}; "
                f"set placement.k to {num_units} or less."
            )
        return lambda values_bU: choose_first(self.order(values_bU), config.k)

    def sentence(self, config: PlacementConfig) -> str:
        """Return, e.g., `the 3 types with the lowest NFN`."""
        return f"the {config.k} {config.granularity}s with the {self._word} NFN"

    def reasons(
        self, candidates: Candidates, values_U: np.ndarray, chosen_U: np.ndarray, config: PlacementConfig
    ) -> Callable[[int], str]:
        """Return how far each unit lies from the cut: from the nearest one on the other side of it."""
        order_U = self.order(values_U)
        known = ~np.isnan(order_U)
        inside, outside = np.flatnonzero(chosen_U & known), np.flatnonzero(~chosen_U & known)
        last = inside[order_U[inside].argmax()] if len(inside) else None
        first = outside[order_U[outside].argmin()] if len(outside) else None
        beyond, within = ("above", "below") if self._word == "lowest" else ("below", "above")

        def reason(unit: int) -> str:
            other = first if chosen_U[unit] else last
            if other is None:
                return f"k = {config.k} takes all candidates there are"
            apart = abs(values_U[unit] - values_U[other])
            side, kept = (within, "left out") if chosen_U[unit] else (beyond, "taken")
            name = candidates.units[other]
            return f"{apart:.4f} {side} {name} ({values_U[other]:.4f}), the nearest one {kept}"

        return reason

    def doubt(self, entries: Sequence[TypeScore], chosen: Collection[str], config: PlacementConfig) -> str | None:
        """Return that the intervals on both sides of the cut overlap."""
        inside = [entry for entry in entries if entry.type in chosen]
        outside = [entry for entry in entries if entry.type not in chosen]
        if not inside or not outside:
            return None
        # In the policy's order the last one inside and the first one outside are those at the cut.
        last, first = max(inside, key=self._position), min(outside, key=self._position)
        if max(map(self._place, last.interval)) <= min(map(self._place, first.interval)):
            return None
        (low_in, high_in), (low_out, high_out) = last.interval, first.interval
        return (
            f"The intervals at the cut overlap: {last.type} (in) {low_in:.4f} to {high_in:.4f}, {first.type} (out) "
            f"{low_out:.4f} to {high_out:.4f}."
        )

    def _position(self, entry: TypeScore) -> float:
        return self._place(entry.nfn)

    def _place(self, value: float) -> float:
        return float(self.order(np.array(value)))


class HighestK(LowestK):
    """placement.k units, highest NFN first."""

    name = "highest_k"
    summary = "the k types (layers, modules) with the highest NFN: the paper's negative control"
    _word = "highest"

    def order(self, values_bU: np.ndarray) -> np.ndarray:
        """Return the negated NFN."""
        return -values_bU


def choose_first(values_bU: np.ndarray, k: int) -> np.ndarray:
    """Return the k units with the lowest value in each row: (b, U), bool; ties go to the first unit, NaN to nobody."""
    num_units = values_bU.shape[1]
    if k >= num_units:
        return ~np.isnan(values_bU)
    # Up to the k-th smallest value these are k units, except where others tie with it or have no value.
    chosen_bU = values_bU <= np.partition(values_bU, k - 1, axis=1)[:, k - 1 : k]
    odd = np.flatnonzero(chosen_bU.sum(axis=1) != k)
    order = np.argsort(values_bU[odd], axis=1, kind="stable")[:, :k]
    first = np.zeros((len(odd), num_units), dtype=bool)
    np.put_along_axis(first, order, True, axis=1)
    chosen_bU[odd] = first & ~np.isnan(values_bU[odd])
    return chosen_bU


LOWEST_K = LowestK()
HIGHEST_K = HighestK()
