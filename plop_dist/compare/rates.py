"""Which learning rates an arm is trained at: a factor of two apart, further out while the best one is at an end."""

from __future__ import annotations

import math
from collections.abc import Mapping

_MOST_FURTHER = 2  # on each side


def first_exponents(num_rates: int) -> list[int]:
    """Return by which powers of two train.learning_rate is multiplied at first, the middle one first.

    >>> first_exponents(3), first_exponents(4)
    ([0, -1, 1], [0, -1, 1, 2])
    """
    low = -((num_rates - 1) // 2)
    return sorted(range(low, low + num_rates), key=lambda exponent: (abs(exponent), exponent))


def best_exponent(losses: Mapping[int, float]) -> int:
    """Return the exponent with the lowest loss, of equal ones the lowest rate's; inf stands for what is out."""
    return min(losses, key=lambda exponent: (losses[exponent], exponent))


def is_bracketed(losses: Mapping[int, float]) -> bool:
    """Tell whether rates on both sides of the best one were worse."""
    best = best_exponent(losses)
    return math.isfinite(losses[best]) and min(losses) < best < max(losses)


def next_exponent(losses: Mapping[int, float], num_rates: int) -> int | None:
    """Return the next rate to try beyond the first ones, or None: it is bracketed, fixed, or far enough.

    losses: of all rates so far, on the rows that choose.
    """
    if num_rates == 1:  # the rate is the user's
        return None
    if len(losses) > 1 and len(set(losses.values())) == 1 and all(map(math.isfinite, losses.values())):
        return None  # nothing tells them apart, say where no completion has earned a reward
    first, best = first_exponents(num_rates), best_exponent(losses)
    if best == min(losses) and min(losses) > min(first) - _MOST_FURTHER:
        return min(losses) - 1
    if best == max(losses) and max(losses) < max(first) + _MOST_FURTHER:
        return max(losses) + 1
    return None


def most_further(num_rates: int) -> int:
    """Return how many rates may come on top of the first ones."""
    return 0 if num_rates == 1 else 2 * _MOST_FURTHER
