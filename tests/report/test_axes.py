"""Axes: values lie where they should, ticks are round, few and inside."""

from __future__ import annotations

import re

import pytest

from plop_dist.report.axes import names_axis, numbers_axis


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values",
    [(0.6, 1.587), (0.2, 40), (1, 1), (0, 0), (0, 1), (-3, 5), (1e-300, 1), (1e99, 1e100), (0.9999, 1.0001), (1, 1e9),
     (5e-324, 5e-324), (1.7e308, 0), (1, 1.5), (1000, 1001)],
)  # fmt: skip
def test_ticks_are_few_round_and_inside(values: tuple[float, ...], is_log: bool) -> None:
    axis = numbers_axis("x", values, is_log=is_log)
    assert axis.low < axis.high
    assert 1 <= len(axis.ticks) <= 8
    assert len({tick.label for tick in axis.ticks}) == len(axis.ticks)
    for tick in axis.ticks:
        assert 0 <= tick.at <= 100
        assert axis.low <= float(tick.label) <= axis.high
        digits = re.sub(r"e.*|[.-]", "", tick.label).strip("0")
        assert len(digits) <= 6, tick.label
    if max(values) < 1e100:
        assert all(axis.low <= value <= axis.high for value in values)


def test_a_logarithmic_axis_has_equal_ratios_equally_far_apart() -> None:
    axis = numbers_axis("samples", [1, 4], is_log=True)
    assert axis.at(2) == pytest.approx((axis.at(1) + axis.at(4)) / 2, abs=0.01)
    axis = numbers_axis("samples", [1, 3])
    assert axis.at(2) == pytest.approx((axis.at(1) + axis.at(3)) / 2, abs=0.01)


def test_names_lie_in_the_middle_of_their_cells() -> None:
    axis = names_axis("layer", [str(layer) for layer in range(94)])
    assert [tick.label for tick in axis.ticks] == ["0", "20", "40", "60", "80"]
    assert axis.ticks[1].at == pytest.approx(100 * 20.5 / 94, abs=0.01)
