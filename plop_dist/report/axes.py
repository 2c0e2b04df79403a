"""Where on an axis a value lies, and which ticks a person reads there; in percent, so that a chart fits any width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_MOST_TICKS = 7
_MOST_NAMES = 8
_LARGEST = 1e100  # what no loss is; differences of such numbers still are numbers


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent of its length."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from low to high, which are different."""

    title: str
    low: float
    high: float
    ticks: tuple[Tick, ...]
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return where a value lies, in percent from the low end; what lies beyond an end, at that end."""
        low, high, place = (math.log(x) if self.is_log else x for x in (self.low, self.high, max(value, self.low)))
        return round(100 * min(1.0, (place - low) / (high - low)), 2)


def numbers_axis(title: str, values: Iterable[float], *, is_log: bool = False, room: float = 0.04) -> Axis:
    """Return an axis that holds all values, one at least, and `room` of its length more at each end.

    is_log: equal ratios are equally far apart; taken where all values are above 0.
    """
    found = [min(max(value, -_LARGEST), _LARGEST) for value in values]
    low, high = min(found), max(found)
    is_log = is_log and low > 1 / _LARGEST
    if is_log:
        factor = (high / low) ** room if high > low else 2.0
        low, high = low / factor, high * factor
    else:
        size = max(abs(low), abs(high))
        is_flat = high - low <= 1e-9 * size or size < 1 / _LARGEST
        margin = (size / 2 if size > 1 / _LARGEST else 1.0) if is_flat else room * (high - low)
        low, high = low - margin if low else 0.0, high + margin
    axis = Axis(title, low, high, (), is_log)
    places = _log_places(low, high) if is_log else _places(low, high)
    return replace(axis, ticks=tuple(Tick(axis.at(place), f"{place:.10g}") for place in places))


def names_axis(title: str, names: Sequence[str]) -> Axis:
    """Return an axis on which the i-th name lies at i + 0.5: all are labelled, or evenly spread ones."""
    axis = Axis(title, 0, len(names), ())
    step = next(step for step in _round_steps() if len(names) <= step * _MOST_NAMES)
    ticks = (Tick(axis.at(index + 0.5), names[index]) for index in range(0, len(names), step))
    return replace(axis, ticks=tuple(ticks))


def is_number(value: Any) -> bool:
    """Tell whether a value can be drawn: a finite number of a size that measurements have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _places(low: float, high: float) -> list[float]:
    """Return round numbers from low to high, evenly spaced."""
    size = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(size * n for n in (1, 2, 5, 10, 20) if (high - low) / (size * n) <= _MOST_TICKS)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def _log_places(low: float, high: float) -> list[float]:
    """Return round numbers from low to high: 1, 2 and 5 times powers of ten, or as many powers as there is room for."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [n * 10.0**power for power in powers for n in (1, 2, 5) if low <= n * 10.0**power <= high]
    if 2 <= len(fine) <= _MOST_TICKS:
        return fine
    if len(fine) < 2:
        return _places(low, high)
    step = math.ceil(len(powers) / _MOST_TICKS)
    return [10.0**power for power in powers if power % step == 0 and low <= 10.0**power <= high]


def _round_steps() -> Iterable[int]:
    """Yield 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10
