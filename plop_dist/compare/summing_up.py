"""What the trainings of all arms come to: their values on the reported rows, and the first arm against every other."""

# S seeds, R held-out rows

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plop_dist.compare.arms import Candidate, budget_of
from plop_dist.compare.method import CHOOSING, REPORTED, Method
from plop_dist.compare.rates import is_bracketed
from plop_dist.compare.resampling import compare_losses, holm
from plop_dist.compare.result import Arm, ArmCost, ArmRun, CompareCost, Comparison, ComparisonOf, RowCounts
from plop_dist.compare.runs import Record
from plop_dist.compare.verdict import margin_of, verdict_of
from plop_dist.config.schema import Config
from plop_dist.values.scores import Scores
from plop_dist.values.versions import versions


@dataclass
class Trained:
    """An arm's trainings: of each rate (its power of two) from the first seed, and at the chosen one from all seeds."""

    candidate: Candidate
    by_rate: dict[int, Record] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    chosen: int = 0
    by_seed: list[Record] = field(default_factory=list)


def sum_up(
    config: Config,
    scores: Scores,
    arms: Sequence[tuple[Candidate, Trained]],
    method: Method,
    base: Sequence[float],
) -> Comparison:
    """Return what the arms' trainings come to, the first against every other.

    base: what each held-out row is worth without adapters. The even rows have chosen the rates, the odd ones are
    reported.
    """
    reported_R = method.targets_R[REPORTED::2]
    base_value = sum(base[REPORTED::2]) / float(reported_R.sum())
    found = [_arm(candidate, trained, method) for candidate, trained in arms]
    every = {id(trained): trained for _, trained in arms}.values()
    records = [record for trained in every for record in (*trained.by_rate.values(), *trained.by_seed[1:])]
    gains = [method.sign * (base_value - arm.value) for arm in found if arm.value is not None]
    rows = [base[REPORTED::2], *(record.reported for record in records if record.reported is not None)]
    margin = margin_of(max(gains, default=0.0), method.least_margin(rows))
    return Comparison(
        method=config.train.method,
        measure=method.measure,
        budget=budget_of(scores, config.placement),
        base=base_value,
        margin=margin,
        rows=RowCounts(choosing=len(base) - len(reported_R), reported=len(reported_R)),
        arms=tuple(found),
        comparisons=tuple(_comparisons(arms, method, margin, config.compare.seed)),
        row_targets=tuple(reported_R.tolist()),
        cost=CompareCost(
            runs=len(records),
            steps=sum(record.steps for record in records),
            seconds=round(sum(record.seconds for record in records), 3),
        ),
        scores_digest=scores.digest,
        versions=versions(),
    )


def _arm(candidate: Candidate, trained: Trained, method: Method) -> Arm:
    def mean(values: Sequence[float] | None, half: int) -> float | None:
        return None if values is None else sum(values) / float(method.targets_R[half::2].sum())

    placement = candidate.placement
    records = [*trained.by_rate.values(), *trained.by_seed[1:]]
    values = [mean(record.reported, REPORTED) for record in trained.by_seed]
    finite = [value for value in values if value is not None]
    losses = {}
    for exponent, record in trained.by_rate.items():
        value = None if exponent in trained.stopped else mean(record.choosing, CHOOSING)
        losses[exponent] = math.inf if value is None else method.sign * value
    return Arm(
        arm=candidate.name,
        module_types=placement.module_types,
        rank=placement.rank,
        alpha=placement.alpha,
        num_trainable_parameters=placement.num_trainable_parameters,
        deviation=candidate.deviation,
        learning_rate=trained.by_rate[trained.chosen].learning_rate,
        bracketed=is_bracketed(losses),
        runs=tuple(
            ArmRun(
                learning_rate=record.learning_rate, seed=record.seed, steps=record.steps,
                value=mean(record.reported, REPORTED), choosing=mean(record.choosing, CHOOSING),
                stopped_early=record.stopped_early, row_values=record.reported,
            )
            for record in records
        ),
        value=sum(finite) / len(finite) if len(finite) == len(values) else None,
        cost=ArmCost(
            tokens_per_second=float(np.mean([record.tokens_per_second for record in records])),
            peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        ),
    )  # fmt: skip


def _comparisons(
    arms: Sequence[tuple[Candidate, Trained]], method: Method, margin: float, seed: int
) -> list[ComparisonOf]:
    """Return the first arm against every other, on the reported rows."""
    targets_R = method.targets_R[REPORTED::2]
    (first, trained), *others = arms
    first_SR = _reported(trained)
    names = {"arm": first.name}
    paired = []
    for _, other in others:
        other_SR = _reported(other)
        if first_SR is None or other_SR is None:
            paired.append(None)
        else:
            paired.append(compare_losses(method.sign * first_SR, method.sign * other_SR, targets_R, seed))
    adjusted = iter(holm([one.p_value for one in paired if one is not None]))
    found = []
    for (other, _), one in zip(others, paired, strict=True):
        if one is None:
            nothing: dict[str, Any] = dict.fromkeys(("difference", "ci95", "p_adjusted", "smallest_detectable"))
            which = first.name if first_SR is None else other.name
            found.append(ComparisonOf(**names, against=other.name, **nothing, verdict=f"undecided, {which} diverged"))
            continue
        p_adjusted = next(adjusted)
        verdict = verdict_of(one, p_adjusted, margin, len(targets_R), len(trained.by_seed))
        found.append(
            ComparisonOf(
                **names, against=other.name, difference=one.difference, ci95=one.ci95, p_adjusted=p_adjusted,
                smallest_detectable=one.smallest_detectable, verdict=verdict,
            )
        )  # fmt: skip
    return found


def _reported(trained: Trained) -> np.ndarray | None:
    """Return the reported rows' values at the chosen rate, (S, R), or None where one of the trainings diverged."""
    values = [record.reported for record in trained.by_seed]
    return None if any(rows is None for rows in values) else np.array(values)
