"""The charts of a comparison, as places in percent: differences with their intervals, and values by learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plop_dist.compare.result import Comparison
from plop_dist.report.axes import Axis, numbers_axis
from plop_dist.report.comparison import gain_text, summary
from plop_dist.report.panels import Panel, lines_panel
from plop_dist.rundir.layout import RunDir
from plop_dist.values.scores import Scores


@dataclass(frozen=True)
class Row:
    """The first arm against another one; at, low, high: places of the difference and of its interval, or None."""

    against: str
    at: float | None
    low: float | None
    high: float | None
    text: str
    verdict: str
    kind: str


@dataclass(frozen=True)
class Forest:
    """All differences over one axis; zero: where none lies; low, high: up to where a difference counts as none."""

    rows: tuple[Row, ...]
    axis: Axis
    zero: float
    low: float
    high: float


def comparison_of(run_dir: RunDir, scores: Scores) -> dict[str, Any] | None:
    """Return what the page shows of a comparison, or None where there is none. Raises ScoresError."""
    if not run_dir.comparison.is_file():
        return None
    found = Comparison.from_file(run_dir.comparison)
    return {
        "found": found,
        "is_older": found.scores_digest not in (None, scores.digest),
        "summary": summary(found),
        "forest": forest_figure(found),
        "rates": rates_panel(found),
    }


def forest_figure(found: Comparison) -> Forest:
    """Return the differences of the first arm to every other one."""
    ends = [end for one in found.comparisons if one.ci95 is not None for end in one.ci95]
    axis = numbers_axis(f"{found.measure}: gain of {found.arms[0].arm}", [*ends, -found.margin, found.margin])
    rows = []
    for one in found.comparisons:
        low, high = (None, None) if one.ci95 is None else map(axis.at, one.ci95)
        at = None if one.difference is None else axis.at(one.difference)
        kind = one.verdict.split()[0].rstrip(",")
        rows.append(Row(one.against, at, low, high, gain_text(one), one.verdict, kind))
    return Forest(tuple(rows), axis, axis.at(0.0), axis.at(-found.margin), axis.at(found.margin))


def rates_panel(found: Comparison) -> Panel | None:
    """Return the value of every arm by its learning rate, from the first seed; what stopped early is left out."""
    lines = {}
    for arm in found.arms:
        seed = arm.runs[0].seed
        points = [
            (run.learning_rate, run.value)
            for run in arm.runs
            if run.seed == seed and run.value is not None and not run.stopped_early
        ]
        lines[arm.arm] = sorted(points)
    return lines_panel(lines, "learning rate", found.measure)
