"""What other k, and fewer samples, would have chosen: from the per-sample sums alone, without a model."""

# M scored modules, U units, B resamples, b resamples of one block, S samples, K choices in turn

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plop_dist.choose.candidates import find_eligible
from plop_dist.choose.decision import Decision, decide_for, resolve_policy
from plop_dist.choose.policies.lowest_highest import choose_first
from plop_dist.choose.units import Candidates
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import Scores

_MAX_ROWS = 40  # of k: all of them for types, evenly spread ones for hundreds of modules


@dataclass(frozen=True)
class Step:
    """One choice of a sweep: at which value, and the unit with which it stops.

    confidence: share of resamples that make the same choice at this value, None without samples.
    """

    value: Any
    added: str
    nfn: float
    num_modules: int
    num_parameters: int
    confidence: float | None


@dataclass(frozen=True)
class BySamples:
    """What the first num_samples samples choose, and P(so many samples drawn anew make the final choice)."""

    num_samples: int
    units: tuple[str, ...]
    is_final_choice: bool
    agreement: float


@dataclass(frozen=True)
class Sweep:
    """steps: the choice at each value of a parameter, k unless the policy varies another; choice: the policy's own.

    by_samples: empty without per-sample sums.
    """

    granularity: str
    choice: tuple[str, ...]
    parameter: str
    steps: tuple[Step, ...]
    by_samples: tuple[BySamples, ...]


def sweep(scores: Scores, policy: PlacementConfig | str | None = None, **options: Any) -> Sweep:
    """Return the choices for every k and for fewer samples, under the candidates and ranks of a policy.

    Arguments and errors are those of `place`, except that k may be anything.
    """
    config = resolve_policy(policy, **options)
    eligible = find_eligible(scores.modules, config, scores.left_out)
    num_units = len(eligible.candidates(config).units)
    return sweep_of(decide_for(scores, config.model_copy(update={"k": min(config.k, num_units)}), eligible))


def sweep_of(decision: Decision) -> Sweep:
    """Return the choices around a decision: at other values of what its policy varies, and for fewer samples."""
    candidates, config, samples = decision.candidates, decision.config, decision.scores.samples
    swept = decision.policy.swept(candidates, config)
    return Sweep(
        granularity=config.granularity,
        choice=_names(candidates, decision.chosen_U, candidates.unit_nfn),
        parameter="k" if swept is None else swept[0],
        steps=tuple(_by_k(decision) if swept is None else _by_value(decision, *swept)),
        by_samples=() if samples is None else tuple(_by_samples(decision, samples)),
    )


def _names(candidates: Candidates, chosen_U: np.ndarray, values_U: np.ndarray) -> tuple[str, ...]:
    order = np.argsort(values_U, kind="stable")
    return tuple(candidates.units[unit] for unit in order[chosen_U[order]].tolist())


def _by_k(decision: Decision) -> list[Step]:
    candidates, samples = decision.candidates, decision.scores.samples
    order_U = _order(decision)
    num_units = len(order_U)
    k_K = np.unique(np.linspace(1, num_units, min(num_units, _MAX_ROWS)).astype(int))
    cost_U = candidates.running_costs(order_U)
    num_modules_U = np.cumsum(candidates.num_modules[order_U])
    share_K = None if samples is None else _share_of_first(decision, samples, order_U, k_K)
    steps = []
    for index, k in enumerate(k_K.tolist()):
        last = int(order_U[k - 1])
        confidence = None if share_K is None else float(share_K[index])
        sizes = int(num_modules_U[k - 1]), int(cost_U[k - 1])
        steps.append(Step(k, candidates.units[last], float(candidates.unit_nfn[last]), *sizes, confidence))
    return steps


def _order(decision: Decision) -> np.ndarray:
    """Return the units in the policy's order: (U,), indices."""
    return np.argsort(decision.policy.order(decision.candidates.unit_nfn), kind="stable")


def _share_of_first(decision: Decision, samples: SampleTotals, order_U: np.ndarray, k_K: np.ndarray) -> np.ndarray:
    """Return in which share of resamples the first k units are those that are first in order_U: (K,), for all k_K.

    Without putting the resamples in order: the first k are the same where none of them comes after one of the others.
    """
    num_same_K, num_rows = np.zeros(len(k_K), dtype=np.int64), 0
    starts = np.append(0, k_K[:-1])
    for values_bU in decision.candidates.resampled(samples):
        rank_bU = decision.policy.order(values_bU)
        ordered_bU = rank_bU[:, order_U]
        # A unit without a token is NaN, which no first one may be and which no other one stands against.
        last_bK = np.maximum.accumulate(np.maximum.reduceat(ordered_bU, starts, axis=1), axis=1)
        next_bK = np.fmin.accumulate(np.fmin.reduceat(ordered_bU, starts, axis=1)[:, ::-1], axis=1)[:, ::-1]
        next_bK = np.append(next_bK[:, 1:], np.full((len(next_bK), 1), np.nan), axis=1)
        next_bK = np.where(np.isnan(next_bK), np.inf, next_bK)
        num_same_K += (last_bK < next_bK).sum(axis=0)
        for index in np.flatnonzero((last_bK == next_bK).any(axis=0)):  # ties go by the units' names
            tied = rank_bU[last_bK[:, index] == next_bK[:, index]]
            first_U = np.isin(np.arange(len(order_U)), order_U[: k_K[index]])
            num_same_K[index] += (choose_first(tied, k_K[index]) == first_U).all(axis=1).sum()
        num_rows += len(values_bU)
    return num_same_K / num_rows


def _by_value(decision: Decision, parameter: str, values: Sequence[Any]) -> list[Step]:
    """Return what the policy chooses at each value, leaving out those at which it can choose nothing."""
    candidates, policy, samples = decision.candidates, decision.policy, decision.scores.samples
    order_U = _order(decision)
    steps: list[Step] = []
    for value in values:
        try:
            rule = policy.rule(candidates, policy.with_setting(decision.config, parameter, value))
        except PlacementError:
            continue
        chosen_U = rule(candidates.unit_nfn[None])[0]
        if chosen_U.any():
            last = int(order_U[chosen_U[order_U]][-1])
            steps.append(
                Step(
                    value=value,
                    added=candidates.units[last],
                    nfn=float(candidates.unit_nfn[last]),
                    num_modules=int(candidates.num_modules[chosen_U].sum()),
                    num_parameters=candidates.cost_of(np.flatnonzero(chosen_U)),
                    confidence=None if samples is None else candidates.share_of(chosen_U, rule, samples),
                )
            )
    return steps


def _by_samples(decision: Decision, samples: SampleTotals) -> list[BySamples]:
    candidates, rule, chosen_U = decision.candidates, decision.rule, decision.chosen_U
    num_samples = len(samples.sample_ids)
    position_S = np.argsort(np.argsort(samples.sample_ids, kind="stable"))
    sizes = sorted({min(2**power, num_samples) for power in range(num_samples.bit_length() + 1)})
    counts = np.array([position_S < size for size in sizes], dtype=np.float64)
    values = np.concatenate(list(candidates.weighted(samples, counts)))
    rows = []
    for size, values_U, choice_U in zip(sizes, values, rule(values), strict=True):
        rows.append(
            BySamples(
                num_samples=size,
                units=_names(candidates, choice_U, values_U),
                is_final_choice=bool((choice_U == chosen_U).all()),
                agreement=candidates.share_of(chosen_U, rule, samples, sample_size=size),
            )
        )
    return rows
