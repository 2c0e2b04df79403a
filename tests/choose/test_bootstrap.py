"""The vectorised bootstrap equals resampling by hand, and says how sure a choice is."""

from __future__ import annotations

import numpy as np
import pytest

from plop_dist.choose.bootstrap import draw_counts, group_means, resampled_nfn, type_intervals
from plop_dist.choose.decision import selection_confidence
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ScoresError
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import Scores
from tests.choose.cases import make_scores


def with_silent_module(scores: Scores) -> SampleTotals:
    """Return sums in which the first module has tokens in sample 0 alone."""
    samples = scores.samples
    assert samples is not None
    gain, tokens = samples.gain_total.copy(), samples.num_tokens.copy()
    gain[0, 1:], tokens[0, 1:] = 0, 0
    return SampleTotals(samples.fqns, samples.sample_ids, gain, tokens, samples.num_skipped)


def test_resampled_nfn_equals_the_sums_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = make_scores(num_layers=2, num_samples=6)
    samples = with_silent_module(scores)
    # Blocks of one row: the result must not depend on how it is cut.
    monkeypatch.setattr("plop_dist.choose.bootstrap._BLOCK_VALUES", 1)
    counts = draw_counts(6, 50, seed=3)
    assert (counts.sum(axis=1) == 6).all()
    nfn = np.concatenate(list(resampled_nfn(scores.modules, samples, counts)))
    for row, weights in zip(nfn, counts, strict=True):
        for index, module in enumerate(scores.modules):
            gain = sum(w * g for w, g in zip(weights, samples.gain_total[index], strict=True))
            tokens = sum(w * n for w, n in zip(weights, samples.num_tokens[index], strict=True))
            expected = gain / tokens / module.baseline if tokens else np.nan
            assert row[index] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert np.isnan(nfn[:, 0]).any()


def test_a_module_without_tokens_is_left_out_of_its_mean() -> None:
    nfn = np.array([[np.nan, 2.0, 4.0, 9.0], [1.0, 2.0, np.nan, np.nan]])
    means = group_means(nfn, np.array([0, 0, 1, -1]), 2)
    np.testing.assert_array_equal(means, [[2.0, 4.0], [1.5, np.nan]])


def test_intervals_hold_the_score_and_narrow_with_samples() -> None:
    few, many = make_scores(num_samples=10, noise=0.3), make_scores(num_samples=160, noise=0.3)
    width = {}
    for scores in (few, many):
        assert scores.samples is not None
        intervals = type_intervals(scores.modules, scores.samples)
        for entry in scores.types:
            low, high = intervals[entry.type]
            assert low < entry.nfn < high
        width[len(scores.samples.sample_ids)] = np.mean([high - low for low, high in intervals.values()])
    assert width[160] < width[10] / 2
    assert type_intervals(few.modules, few.samples) == type_intervals(few.modules, few.samples)


def test_confidence_is_the_share_of_resamples_with_the_same_lowest() -> None:
    scores = make_scores({"a_proj": 1.0, "b_proj": 1.02, "c_proj": 3.0}, num_layers=1, noise=0.3)
    assert scores.samples is not None
    lowest = min(range(3), key=lambda index: scores.modules[index].nfn)
    counts = draw_counts(24, 1000, seed=0)
    nfn = (counts @ scores.samples.gain_total.T) / (counts @ scores.samples.num_tokens.T.astype(float)) / 2
    expected = float((nfn.argmin(axis=1) == lowest).mean())
    assert selection_confidence(scores.modules, scores.samples, PlacementConfig(k=1)) == expected
    assert 0.3 < expected < 0.999
    far = make_scores({"a_proj": 1.0, "b_proj": 2.0, "c_proj": 3.0}, num_layers=1)
    assert selection_confidence(far.modules, far.samples, PlacementConfig(k=1)) == 1.0


def test_absent_module_is_named() -> None:
    scores, other = make_scores(), make_scores({"z_proj": 1.0})
    assert other.samples is not None
    with pytest.raises(ScoresError, match=r"has no module 'model\.layers\.0\.self_attn\.q_proj'"):
        type_intervals(scores.modules, other.samples)
