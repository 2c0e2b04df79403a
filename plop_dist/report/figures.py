"""The charts of the scores, as places in percent that a template draws: bars of types, a heat map of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.place import ordered_types
from plop_dist.report.axes import Axis, names_axis, numbers_axis
from plop_dist.report.spread import Spread, cells, spread_of
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

NUM_LEVELS = 10  # colours of the heat map, each for a tenth of its cells
_LOG_ABOVE = 20  # largest ratio of two NFNs that is still read on a linear axis
_NUM_EXTREMES = 3
_THINNEST = 0.2  # percent; a bar that can still be seen


@dataclass(frozen=True)
class Bar:
    """One type: its bar goes from 1 to its NFN; low and high: its 95% interval, or None."""

    type: str
    nfn: float
    is_chosen: bool
    start: float
    width: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bars:
    """NFN per type; one: where 1.0 lies."""

    bars: tuple[Bar, ...]
    axis: Axis
    one: float


@dataclass(frozen=True)
class Cell:
    """One type in one layer: which row, where it begins and how wide it is, and which tenth it belongs to.

    extreme: "lowest" or "highest" for those at the ends, else None; lines: what is said of it.
    """

    row: int
    x: float
    width: float
    level: int
    extreme: str | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class HeatMap:
    """NFN by layer and type; bounds: of the levels, lowest to highest, one more than levels.

    lowest, highest: NFN and name of the cells that are marked, the most extreme first.
    """

    types: tuple[tuple[str, bool], ...]
    axis: Axis
    cells: tuple[Cell, ...]
    bounds: tuple[float, ...]
    lowest: tuple[tuple[float, str], ...]
    highest: tuple[tuple[float, str], ...]


def types_figure(scores: Scores, placement: Placement | None) -> Bars:
    """Return NFN per type with 95% intervals, lowest at the top."""
    entries = {entry.type: entry for entry in scores.types}
    ordered = [entries[name] for name in ordered_types(scores)]
    chosen = _chosen_types(placement)
    ends = [end for entry in ordered for end in entry.nfn_ci95 or ()]
    values = [1.0, *(entry.nfn for entry in ordered), *ends]
    axis = numbers_axis("NFN", values, is_log=max(values) > _LOG_ABOVE * min(values))
    one = axis.at(1.0)
    bars = []
    for entry in ordered:
        at = axis.at(entry.nfn)
        low, high = (None, None) if entry.nfn_ci95 is None else map(axis.at, entry.nfn_ci95)
        width = max(round(abs(at - one), 2), _THINNEST)
        bars.append(Bar(entry.type, entry.nfn, entry.type in chosen, min(at, one), width, low, high))
    return Bars(tuple(bars), axis, one)


def heatmap_figure(scores: Scores, placement: Placement | None) -> HeatMap:
    """Return NFN by layer and type; a cell with several modules (experts) shows their mean, and tells their spread.

    Each colour holds a tenth of the cells, so that one extreme layer does not make all others look alike.
    """
    spreads = {cell: spread_of(modules) for cell, modules in cells(scores).items()}
    types, layers = ordered_types(scores), sorted({layer for _, layer in spreads})
    row_of, column_of = ({name: index for index, name in enumerate(names)} for names in (types, layers))
    nfn_C = np.array([spread.nfn for spread in spreads.values()])
    bounds = np.quantile(nfn_C, np.linspace(0, 1, NUM_LEVELS + 1))
    level_C = np.clip(np.searchsorted(bounds, nfn_C, side="right") - 1, 0, NUM_LEVELS - 1).tolist()
    ordered = sorted(spreads, key=lambda cell: spreads[cell].nfn)
    ends = min(_NUM_EXTREMES, len(ordered) // 2)
    lowest, highest = ordered[:ends], ordered[len(ordered) - ends :]
    extremes = {**dict.fromkeys(lowest, "lowest"), **dict.fromkeys(highest, "highest")}
    axis = names_axis("layer", [layer_name(layer) for layer in layers])
    found = []
    for (cell, spread), level in zip(spreads.items(), level_C, strict=True):
        column = column_of[cell[1]]
        start = axis.at(column)
        width = round(axis.at(column + 1) - start, 2)
        lines = cell_lines(spread, cell[1])
        found.append(Cell(row_of[cell[0]], start, width, level, extremes.get(cell), lines))
    return HeatMap(
        types=tuple((name, name in _chosen_types(placement)) for name in types),
        axis=axis,
        cells=tuple(found),
        bounds=tuple(bounds.tolist()),
        lowest=tuple((spreads[cell].nfn, _cell_name(spreads[cell], cell)) for cell in lowest),
        highest=tuple((spreads[cell].nfn, _cell_name(spreads[cell], cell)) for cell in reversed(highest)),
    )


def cell_lines(spread: Spread, layer: int) -> tuple[str, ...]:
    """Return what is said of the modules of one type in one layer."""
    means = f"NFN {spread.nfn:.4f} = gain {spread.gain:.4g} / baseline {spread.baseline:.4g}"
    tokens = f"{spread.num_tokens:,} tokens"
    if spread.num_modules == 1:
        return (spread.lowest.fqn, means, tokens)
    low, median, high = (spread.quantiles[index] for index in (0, 2, 4))
    return (
        f"{spread.num_modules} modules of {spread.lowest.type}, layer {layer_name(layer)}; on average:",
        means,
        tokens,
        f"median {median:.4f}, 5% to 95%: {low:.4f} to {high:.4f}",
        f"lowest {spread.lowest.nfn:.4f}: {spread.lowest.fqn}",
        f"highest {spread.highest.nfn:.4f}: {spread.highest.fqn}",
    )


def layer_name(layer: int) -> str:
    """Return a layer as a person reads it."""
    return "outside" if layer < 0 else str(layer)


def _cell_name(spread: Spread, cell: tuple[str, int]) -> str:
    return spread.lowest.fqn if spread.num_modules == 1 else f"{cell[0]}, layer {layer_name(cell[1])}"


def _chosen_types(placement: Placement | None) -> Sequence[str]:
    return () if placement is None else placement.module_types
