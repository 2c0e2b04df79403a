"""How large a difference between two arms is, and how sure: a paired bootstrap over held-out rows and seeds.

Both arms were trained with the same seeds and read the same rows, so that only differences are resampled: rows and
seeds, each with replacement and apart, and their variances add up (as in Owen's pigeonhole bootstrap, 2007). Of few
seeds a bootstrap finds too little: their part is multiplied by n / (n - 1), and the interval is Student's, with the
degrees of freedom of both parts (Satterthwaite). With three seeds that disagree it is wide, as it has to be.
"""

# S seeds, R rows, B resamples

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
_LEVEL = 0.95
_POWER = 0.8
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Paired:
    """A difference of two arms in the measure's unit, positive where the first has the lower losses.

    of_rows, of_seeds: what rows and seeds add to its variance; degrees: of freedom of the sum.
    """

    difference: float
    of_rows: float
    of_seeds: float
    degrees: float

    @property
    def stderr(self) -> float:
        """The standard error."""
        return math.sqrt(self.of_rows + self.of_seeds)

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95% interval."""
        half = student_quantile(0.5 + _LEVEL / 2, self.degrees) * self.stderr
        return self.difference - half, self.difference + half

    @property
    def p_value(self) -> float:
        """The probability of so large a difference, or a larger one, where there is none."""
        if self.stderr == 0:
            return 1.0 if self.difference == 0 else 0.0
        return 2 * student_tail(abs(self.difference) / self.stderr, self.degrees)

    @property
    def smallest_detectable(self) -> float:
        """The difference that is found in 80% of such comparisons, at the 95% level."""
        quantiles = (student_quantile(share, self.degrees) for share in (0.5 + _LEVEL / 2, _POWER))
        return sum(quantiles) * self.stderr


def compare_losses(first_SR: np.ndarray, other_SR: np.ndarray, targets_R: np.ndarray, seed: int) -> Paired:
    """Return the difference of two arms' mean losses per target token, other minus first. Deterministic.

    first_SR, other_SR: (S, R), summed losses of the same rows from trainings with the same seeds; targets_R: (R,), how
    many tokens of each row are in the loss. At least two seeds and two rows.
    """
    gain_SR = other_SR - first_SR
    num_seeds, num_rows = gain_SR.shape
    difference = float(gain_SR.mean(axis=0).sum() / targets_R.sum())
    rng = np.random.default_rng(seed)
    rows_BR = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    seeds_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES) / num_seeds
    of_rows = float(np.var(rows_BR @ gain_SR.mean(axis=0) / (rows_BR @ targets_R)))
    per_seed_S = gain_SR.sum(axis=1) / targets_R.sum()
    of_seeds = float(np.var(seeds_BS @ per_seed_S)) * num_seeds / (num_seeds - 1)
    total = of_rows + of_seeds
    spread = of_rows**2 / (num_rows - 1) + of_seeds**2 / (num_seeds - 1)
    return Paired(difference, of_rows, of_seeds, total**2 / spread if spread > 0 else math.inf)


def is_behind(losses_R: np.ndarray, other_R: np.ndarray, targets_R: np.ndarray) -> bool:
    """Tell whether one training's loss lies above another's by more than two standard errors, paired by rows."""
    gap_R = losses_R - other_R
    mean = gap_R.sum() / targets_R.sum()
    # Of a ratio of two sums over the same rows, to first order.
    stderr = math.sqrt(float(np.var(gap_R - mean * targets_R, ddof=1)) * len(gap_R)) / targets_R.sum()
    return bool(mean > 2 * stderr)


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted so that the chance of any false find among all of them keeps the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def student_tail(t: float, degrees: float) -> float:
    """Return the probability above t, t at least 0, of Student's distribution: half a regularised incomplete beta.

    >>> round(student_tail(2.0, math.inf), 5), round(student_tail(4.302653, 2), 5)
    (0.02275, 0.025)
    """
    if degrees > 1e5:
        return 0.5 * math.erfc(t / math.sqrt(2))
    # The integral of the density, (1 + x^2 / v)^(-(v + 1) / 2), with x = sqrt(v) tan(a): cos(a)^(v - 1) up to pi / 2.
    start = math.atan(t / math.sqrt(degrees))
    # Squeezed towards pi / 2, where few degrees of freedom leave a power below one.
    u = (_NODES + 1) / 2
    width = math.pi / 2 - start
    rest = width * u**2
    integral = float((_WEIGHTS * u * width * np.sin(rest) ** (degrees - 1)).sum())
    log_total = math.lgamma(degrees / 2) + 0.5 * math.log(math.pi) - math.lgamma((degrees + 1) / 2)
    return integral / math.exp(log_total)


def student_quantile(share: float, degrees: float) -> float:
    """Return where so large a share of Student's distribution lies below, share above one half.

    >>> round(student_quantile(0.975, 2), 4), round(student_quantile(0.975, math.inf), 4)
    (4.3027, 1.96)
    """
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > 1 - share else (low, middle)
    return (low + high) / 2
