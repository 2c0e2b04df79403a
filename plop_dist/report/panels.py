"""The charts of lines: experts by layer, the choice by samples, the training by steps; as places in percent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plop_dist.choose.sweep import Sweep
from plop_dist.report.axes import Axis, is_number, names_axis, numbers_axis
from plop_dist.report.figures import cell_lines, layer_name
from plop_dist.report.spread import FoldedType

_MOST_POINTS = 500
_MOST_DOTS = 60
NUM_COLOURS = 8

_Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A point that tells about itself; radius in pixels."""

    x: float
    y: float
    radius: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A line through places "x,y x,y ..."; colour: which of NUM_COLOURS; dots: some or all of its points."""

    name: str
    colour: int
    places: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Panel:
    """Lines over the same axes; y goes upwards, places downwards. bands: areas behind them, the widest first."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    bands: tuple[str, ...] = ()


def folded_panels(types: Sequence[FoldedType]) -> list[Panel]:
    """Return a panel for each type that has many modules in a layer: where these lie in each layer."""
    return [_folded_panel(entry) for entry in types]


def _folded_panel(entry: FoldedType) -> Panel:
    spreads = list(entry.by_layer.values())
    x = names_axis("layer", [layer_name(layer) for layer in entry.by_layer])
    y = numbers_axis("NFN", [end.nfn for spread in spreads for end in (spread.lowest, spread.highest)])
    at_L = [x.at(index + 0.5) for index in range(len(spreads))]

    def edge(quantile: int) -> list[str]:
        return [f"{at},{_up(y, s.quantiles[quantile])}" for at, s in zip(at_L, spreads, strict=True)]

    medians, ends = [], []
    for at, layer, spread in zip(at_L, entry.by_layer, spreads, strict=True):
        medians.append(Dot(at, _up(y, spread.quantiles[2]), 2.5, cell_lines(spread, layer)))
        for end in (spread.lowest, spread.highest):
            ends.append(Dot(at, _up(y, end.nfn), 1.5, (f"{end.nfn:.4f}: {end.fqn}",)))
    lines = (Line("median", 0, " ".join(edge(2)), tuple(medians)), Line("ends", 1, "", tuple(ends)))
    bands = tuple(" ".join([*edge(low), *reversed(edge(high))]) for low, high in ((0, 4), (1, 3)))
    return Panel(entry.type, x, y, lines, bands)


def samples_panel(sweep: Sweep) -> Panel | None:
    """Return how often so many samples make the final choice, or None without per-sample sums."""
    if not sweep.by_samples:
        return None
    points = [(float(entry.num_samples), entry.agreement) for entry in sweep.by_samples]
    texts = [(f"{n:,.0f} samples: {share:.1%} of draws make the final choice",) for n, share in points]
    x = numbers_axis("samples", [n for n, _ in points], is_log=True)
    y = numbers_axis("P(final choice)", [0.0, 1.0])
    return Panel("How often so many samples make the final choice", x, y, (_line("", 0, points, texts, x, y),))


def training_panel(entries: Iterable[Mapping[str, Any]], names: Mapping[str, str], title: str) -> Panel | None:
    """Return logged quantities over the steps, or None if none was ever logged. names: key in an entry -> label."""
    points: dict[str, list[_Point]] = defaultdict(list)
    for entry in entries:
        for key in names:
            _add(points[key], entry.get("step"), entry.get(key))
    return _over_steps({names[key]: found for key, found in points.items()}, title)


def tracked_nfn_panel(log: Iterable[Mapping[str, Any]]) -> Panel | None:
    """Return the NFN of each type of the adapted model over the steps, or None if it was not tracked."""
    points: dict[str, list[_Point]] = defaultdict(list)
    for entry in log:
        nfn = entry.get("nfn")
        if isinstance(nfn, Mapping):
            for name, value in nfn.items():
                _add(points[str(name)], entry.get("step"), value)
    return _over_steps(points, "NFN of the adapted model")


def lines_panel(points: Mapping[str, Sequence[_Point]], x_title: str, y_title: str) -> Panel | None:
    """Return lines over a quantity whose values are factors apart, or None without any."""
    drawn = {name: found for name, found in points.items() if found}
    if not drawn:
        return None
    x = numbers_axis(x_title, [place for found in drawn.values() for place, _ in found], is_log=True)
    y = numbers_axis(y_title, [value for found in drawn.values() for _, value in found])
    lines = []
    for index, (name, found) in enumerate(drawn.items()):
        texts = [(f"{name}: {value:.4f}", f"{x_title} {place:.3g}") for place, value in found]
        lines.append(_line(name, index % NUM_COLOURS, found, texts, x, y))
    return Panel(f"{y_title} by {x_title}", x, y, tuple(lines))


def _add(points: list[_Point], step: Any, value: Any) -> None:
    if is_number(step) and is_number(value):
        points.append((step, value))


def _over_steps(points: Mapping[str, list[_Point]], title: str) -> Panel | None:
    drawn = {name: _thinned(found, _MOST_POINTS) for name, found in points.items() if found}
    if not drawn:
        return None
    x = numbers_axis("step", [step for found in drawn.values() for step, _ in found], room=0.02)
    y = numbers_axis(title, [value for found in drawn.values() for _, value in found])
    lines = []
    for index, (name, found) in enumerate(drawn.items()):
        texts = [(f"{name}: {value:.4g}", f"step {step:,}") for step, value in found]
        lines.append(_line(name, index % NUM_COLOURS, found, texts, x, y))
    return Panel(title, x, y, tuple(lines))


def _line(name: str, colour: int, points: Sequence[_Point], texts: Sequence[tuple[str, ...]], x: Axis, y: Axis) -> Line:
    at = [(x.at(place), _up(y, value)) for place, value in points]
    dots = [Dot(*place, 3, lines) for place, lines in zip(at, texts, strict=True)]
    return Line(name, colour, " ".join(f"{a},{b}" for a, b in at), tuple(_thinned(dots, _MOST_DOTS)))


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Return so many items at most, evenly spread, the last one among them: a screen has no room for more."""
    step = -(-len(items) // most)
    return list(items) if step <= 1 else list(items[::-step][::-1])


def _up(axis: Axis, value: float) -> float:
    return round(100 - axis.at(value), 2)
