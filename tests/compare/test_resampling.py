"""Differences and their certainty: no find where there is nothing, a find with the right sign where there is much."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from plop_dist.compare.resampling import Paired, compare_losses, holm, is_behind, student_quantile, student_tail
from plop_dist.compare.verdict import margin_of, verdict_of

NUM_ROWS = 128


def losses(
    rng: np.random.Generator, num_seeds: int, of_seeds: float, of_pairs: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed losses of rows from trainings with several seeds, (S, R), and the rows' tokens.

    Rows differ far more than trainings do, as held-out rows do; of_seeds: how much a seed moves all of them.
    """
    targets_R = rng.integers(5, 120, NUM_ROWS).astype(float)
    per_token = 1.5 + 0.6 * rng.standard_normal(NUM_ROWS) + of_seeds * rng.standard_normal((num_seeds, 1))
    return (per_token + of_pairs * rng.standard_normal((num_seeds, NUM_ROWS))) * targets_R, targets_R


@pytest.mark.slow
@pytest.mark.parametrize("of_seeds", [0.0, 0.003, 0.05])
def test_one_arm_under_two_names_is_seldom_better_or_worse(of_seeds: float) -> None:
    """The trainings of one arm are dealt to two names, and its rows drawn anew: whether rows or seeds move the most."""
    rng = np.random.default_rng(1)
    stored_SR, targets_R = losses(rng, 12, of_seeds)
    verdicts = []
    for draw in range(20):
        seeds, rows = rng.permutation(12)[:6], rng.integers(0, NUM_ROWS, NUM_ROWS)
        first_SR, other_SR = stored_SR[seeds[:3]][:, rows], stored_SR[seeds[3:]][:, rows]
        paired = compare_losses(first_SR, other_SR, targets_R[rows], draw)
        verdicts.append(verdict_of(paired, paired.p_value, 0.02, NUM_ROWS, 3))
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= 2


@pytest.mark.slow
def test_the_interval_holds_what_it_says_where_seeds_move_most() -> None:
    rng = np.random.default_rng(2)
    missed, missed_by_a_plain_bootstrap = 0, 0
    for draw in range(120):
        first_SR, targets_R = losses(rng, 3, 0.05)
        other_SR = first_SR + targets_R * 0.05 * rng.standard_normal((3, 1))
        paired = compare_losses(first_SR, other_SR, targets_R, draw)
        missed += not paired.ci95[0] <= 0 <= paired.ci95[1]
        plain = math.sqrt(paired.of_rows + paired.of_seeds * 2 / 3)
        missed_by_a_plain_bootstrap += abs(paired.difference) > 1.96 * plain
    assert missed / 120 <= 0.1
    assert missed_by_a_plain_bootstrap / 120 > 0.15  # which is why seeds are not left to it


def test_a_planted_difference_is_found_with_its_sign() -> None:
    rng = np.random.default_rng(3)
    first_SR, targets_R = losses(rng, 3, 0.002)
    other_SR = first_SR + targets_R * (0.04 + 0.02 * rng.standard_normal((3, NUM_ROWS)))
    for sign, (one, two) in ((1, (first_SR, other_SR)), (-1, (other_SR, first_SR))):
        paired = compare_losses(one, two, targets_R, 0)
        assert sign * paired.difference == pytest.approx(0.04, abs=0.005)
        assert verdict_of(paired, paired.p_value, 0.02, NUM_ROWS, 3) == ("better" if sign > 0 else "worse")


def test_the_difference_is_that_of_means_per_token_and_rows_are_paired() -> None:
    rng = np.random.default_rng(4)
    first_SR, targets_R = losses(rng, 3, 0.0)
    other_SR = first_SR + targets_R * 0.01
    paired = compare_losses(first_SR, other_SR, targets_R, 0)
    mean = (other_SR.sum() - first_SR.sum()) / (3 * targets_R.sum())
    assert paired.difference == pytest.approx(mean, rel=1e-12)
    assert paired.stderr < 1e-9  # rows that are easy or hard for both say nothing of the difference
    assert compare_losses(first_SR, other_SR, targets_R, 0) == paired


def test_variances_are_those_of_theory() -> None:
    rng = np.random.default_rng(5)
    first_SR, targets_R = losses(rng, 5, 0.0)
    gain_SR = rng.standard_normal((5, NUM_ROWS)) + 2 * rng.standard_normal((5, 1))
    targets_R = np.ones(NUM_ROWS)
    paired = compare_losses(first_SR, first_SR + gain_SR, targets_R, 0)
    assert paired.of_rows == pytest.approx(gain_SR.mean(axis=0).var() / NUM_ROWS, rel=0.1)
    assert paired.of_seeds == pytest.approx(gain_SR.mean(axis=1).var(ddof=1) / 5, rel=0.1)


@pytest.mark.parametrize("degrees", [1, 1.4, 2, 5.5, 60, 3e4])
def test_student_s_distribution_is_scipy_s(degrees: float) -> None:
    for t in (0.0, 0.4, 2.0, 8.0):
        assert student_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-7)
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-7)


def test_no_difference_at_all_is_no_find() -> None:
    rng = np.random.default_rng(6)
    first_SR, targets_R = losses(rng, 3, 0.1)
    paired = compare_losses(first_SR, first_SR, targets_R, 0)
    assert (paired.difference, paired.p_value, paired.ci95) == (0.0, 1.0, (0.0, 0.0))
    assert verdict_of(paired, 1.0, 0.01, NUM_ROWS, 3) == "no difference larger than 0"


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.02, 0.03, 0.5]) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert holm([]) == []


def test_a_rate_is_stopped_when_it_is_clearly_behind_and_not_when_rows_disagree() -> None:
    rng = np.random.default_rng(7)
    (row_R,), targets_R = losses(rng, 1, 0.0)
    noise_R = rng.standard_normal(NUM_ROWS)
    noise_R -= (noise_R * targets_R).sum() / targets_R.sum()
    assert is_behind(row_R + targets_R * (0.05 + 0.1 * noise_R), row_R, targets_R)
    assert not is_behind(row_R + targets_R * (0.005 + 0.1 * noise_R), row_R, targets_R)
    assert not is_behind(row_R, row_R + 0.05 * targets_R, targets_R)


def test_verdicts_say_what_is_missing() -> None:
    rows_move = Paired(0.004, of_rows=0.02**2, of_seeds=1e-7, degrees=120.0)
    seeds_move = Paired(0.004, of_rows=1e-7, of_seeds=0.02**2, degrees=2.0)
    assert verdict_of(rows_move, 1.0, 0.05, 128, 3) == "no difference larger than 0.044"
    assert verdict_of(rows_move, 1.0, 0.02, 128, 3) == "undecided, needs 2,014 rows"
    assert verdict_of(seeds_move, 1.0, 0.02, 128, 3) == "undecided, needs 48 seeds"
    # With so many rows it is what it promises: a difference of the margin is found in 80% of comparisons.
    enough = Paired(0.0, of_rows=0.02**2 * 256 / 2014, of_seeds=1e-7, degrees=math.inf)
    assert enough.smallest_detectable == pytest.approx(0.02, rel=0.001)
    assert margin_of(1.0, 0.002) == pytest.approx(0.05)
    assert margin_of(-0.1, 0.002) == pytest.approx(0.002)
