"""Which rates are tried, and when the best of them is bracketed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from plop_dist.compare.rates import best_exponent, first_exponents, is_bracketed, most_further, next_exponent


def search(loss: Callable[[int], float], num_rates: int = 3) -> tuple[list[int], dict[int, float]]:
    """Return the rates in the order in which they are tried, and their losses."""
    tried: dict[int, float] = {}
    todo = first_exponents(num_rates)
    while todo:
        tried |= {exponent: loss(exponent) for exponent in todo}
        further = next_exponent(tried, num_rates)
        todo = [] if further is None else [further]
    return list(tried), tried


@pytest.mark.parametrize(
    ("best", "tried", "bracketed"),
    [(0, [0, -1, 1], True), (1, [0, -1, 1, 2], True), (2, [0, -1, 1, 2, 3], True), (9, [0, -1, 1, 2, 3], False),
     (-2, [0, -1, 1, -2, -3], True), (-9, [0, -1, 1, -2, -3], False)],
)  # fmt: skip
def test_rates_go_out_until_the_best_lies_between_worse_ones(best: int, tried: list[int], bracketed: bool) -> None:
    order, losses = search(lambda exponent: abs(exponent - best))
    assert order == tried
    assert is_bracketed(losses) is bracketed
    assert len(order) <= 3 + most_further(3)


def test_a_single_rate_is_the_user_s_and_never_bracketed() -> None:
    order, losses = search(lambda exponent: 1.0, num_rates=1)
    assert order == [0]
    assert not is_bracketed(losses)


def test_what_diverges_is_worse_than_all_and_ties_go_to_the_lower_rate() -> None:
    order, losses = search(lambda exponent: math.inf if exponent > -1 else 1.0 + exponent / 10)
    assert best_exponent(losses) == -3
    assert order == [0, -1, 1, -2, -3]
    assert best_exponent({0: 1.0, -1: 1.0, 1: 1.0}) == -1
    assert not is_bracketed({0: math.inf, -1: math.inf, 1: math.inf})


def test_rates_that_nothing_tells_apart_are_not_searched_further() -> None:
    """As where no completion has earned a reward; what diverges at every rate is searched below."""
    order, losses = search(lambda exponent: -0.25)
    assert order == [0, -1, 1]
    assert not is_bracketed(losses)
    order, _ = search(lambda exponent: math.inf)
    assert order == [0, -1, 1, -2, -3]
