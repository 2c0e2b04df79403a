"""What a difference means in words: better, worse, none that matters, or not enough rows or seeds to tell."""

from __future__ import annotations

import math

from plop_dist.compare.resampling import Paired, student_quantile

_LEVEL = 0.05
_MARGIN_OF_GAIN = 0.05


def margin_of(gain: float, least: float) -> float:
    """Return up to which size a difference counts as none: 5% of what the best arm has gained over the base model.

    least: what it is where nothing was learnt.
    """
    return max(_MARGIN_OF_GAIN * gain, least)


def verdict_of(paired: Paired, p_adjusted: float, margin: float, num_rows: int, num_seeds: int) -> str:
    """Return the verdict of the first arm against another.

    num_rows: reported ones; what is said to be needed is compare.held_out, of which they are half.
    """
    if p_adjusted < _LEVEL:
        return "better" if paired.difference > 0 else "worse"
    largest = max(map(abs, paired.ci95))
    if largest <= margin:
        return f"no difference larger than {_rounded_up(largest)}"
    # Enough to find a difference of the margin in 80% of comparisons.
    wanted = (margin / (student_quantile(0.975, math.inf) + student_quantile(0.8, math.inf))) ** 2
    if paired.of_seeds <= wanted / 2:
        rows = math.ceil(2 * num_rows * paired.of_rows / (wanted - paired.of_seeds))
        if rows > 2 * num_rows:
            return f"undecided, needs {rows:,} rows"
    seeds = max(num_seeds + 1, math.ceil(num_seeds * paired.of_seeds / (wanted / 2)))
    return f"undecided, needs {seeds:,} seeds"


def _rounded_up(value: float) -> str:
    """Return a value with two digits, none of which makes it smaller.

    >>> _rounded_up(0.021301), _rounded_up(0.0)
    ('0.022', '0')
    """
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step - 1e-9) * step:.3g}"
