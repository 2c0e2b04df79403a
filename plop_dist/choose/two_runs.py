"""Do two runs choose differently: other data on one model, or a model and what was trained from it?"""

# B resamples, U units

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.decision import Decision, decide
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ScoresError
from plop_dist.values.names import natural_key
from plop_dist.values.scores import Scores


@dataclass(frozen=True)
class TypeInRuns:
    """A type's NFN in both runs, None where one has no score of it, and whether each chooses of it."""

    type: str
    nfn_first: float | None
    nfn_second: float | None
    in_first: bool
    in_second: bool


@dataclass(frozen=True)
class RunsDifference:
    """What one policy chooses in two runs.

    only_first, only_second: units (types, layers or modules) that one alone chooses. probability_of_same: in which
    share of bootstrap resamples of both runs' samples the choices are equal, None without per-sample sums. spearman:
    rank correlation of the NFN of the modules that both have scored, None for fewer than three.
    """

    types: tuple[TypeInRuns, ...]
    both: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    probability_of_same: float | None
    num_modules: int
    spearman: float | None

    @property
    def is_same(self) -> bool:
        """Whether both runs choose the same units."""
        return not self.only_first and not self.only_second

    def lines(self) -> list[str]:
        """Return the difference as plain text lines."""
        width = max(len("type"), *(len(row.type) for row in self.types))
        text = [f"{'type':<{width}}  {'NFN first':>9}  {'NFN second':>10}  chosen in"]
        for row in self.types:
            chosen = {(True, True): "both", (True, False): "first", (False, True): "second"}
            cells = (_number(row.nfn_first, 9), _number(row.nfn_second, 10), chosen.get((row.in_first, row.in_second)))
            text.append(f"{row.type:<{width}}  {cells[0]}  {cells[1]}  {cells[2] or '-'}")
        if self.is_same:
            text.append(f"the same choice: {', '.join(self.both)}")
        else:
            alone = ((self.only_first, "first"), (self.only_second, "second"))
            said = "; ".join(f"{', '.join(units)} in the {which} run alone" for units, which in alone if units)
            text.append(f"another choice: {said}")
        if self.probability_of_same is not None:
            text.append(f"equal in {self.probability_of_same:.0%} of resamples of the samples of both")
        if self.spearman is not None:
            text.append(f"order of the {self.num_modules:,} modules that both have: Spearman {self.spearman:.3f}")
        return text


def compare_runs(first: Scores, second: Scores, config: PlacementConfig) -> RunsDifference:
    """Return what a policy chooses in two runs. Deterministic; needs no model.

    Raises ScoresError where the runs have no module in common, PlacementError and ConfigError as `place` does.
    """
    nfn = [{module.fqn: module.nfn for module in scores.modules} for scores in (first, second)]
    common = [fqn for fqn in nfn[0] if fqn in nfn[1]]
    if not common:
        raise ScoresError(
            "the two runs have no module in common: they are of different models, whose modules have other names."
        )
    decisions = decide(first, config), decide(second, config)
    units = sorted({unit for one in decisions for unit in one.candidates.units}, key=natural_key)
    chosen = [_spread(one, one.chosen_U[None], units)[0] for one in decisions]
    at = [{entry.type: entry.nfn for entry in scores.types} for scores in (first, second)]
    types = [{module.type for module in one.candidates.members(one.chosen_U)} for one in decisions]
    order = sorted({*at[0], *at[1]}, key=lambda name: (at[0].get(name, at[1].get(name, 0.0)), natural_key(name)))
    return RunsDifference(
        types=tuple(
            TypeInRuns(name, at[0].get(name), at[1].get(name), name in types[0], name in types[1]) for name in order
        ),
        both=_named(units, chosen[0] & chosen[1]),
        only_first=_named(units, chosen[0] & ~chosen[1]),
        only_second=_named(units, chosen[1] & ~chosen[0]),
        probability_of_same=_probability(decisions, units),
        num_modules=len(common),
        spearman=_spearman([nfn[0][fqn] for fqn in common], [nfn[1][fqn] for fqn in common]),
    )


def _spread(decision: Decision, choices_BU: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return choices among one run's units as choices among those of both."""
    place = {unit: index for index, unit in enumerate(units)}
    found = np.zeros((len(choices_BU), len(units)), dtype=bool)
    found[:, [place[unit] for unit in decision.candidates.units]] = choices_BU
    return found


def _probability(decisions: Sequence[Decision], units: Sequence[str]) -> float | None:
    first, second = (one.choices for one in decisions)
    if first is None or second is None:
        return None
    # The same samples in both runs (a model and what was trained from it) are drawn together.
    equal_B = _spread(decisions[0], first, units) == _spread(decisions[1], second, units)
    return float(equal_B.all(axis=1).mean())


def _named(units: Sequence[str], chosen_U: np.ndarray) -> tuple[str, ...]:
    return tuple(unit for unit, is_chosen in zip(units, chosen_U, strict=True) if is_chosen)


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 3:
        return None
    ranks, others = (_ranks(np.round(values, 12)) for values in (first, second))
    return float(np.corrcoef(ranks, others)[0, 1]) if ranks.std() > 0 and others.std() > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, equal ones sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>{width}}"
