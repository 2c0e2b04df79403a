"""How sure the scores are: calibration samples drawn again with replacement, exactly, from the per-sample sums."""

# M modules, S samples, B resamples, b resamples of one block, G groups (types or other units)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from plop_dist.values.scores import ModuleScore, SampleTotals

NUM_RESAMPLES = 1000
_BLOCK_VALUES = 4_000_000  # float64 values per (b, M) block: 32 MB, whatever the model's size

PolicyFunction = Callable[[np.ndarray], np.ndarray]


def draw_counts(num_samples: int, num_resamples: int, seed: int, sample_size: int | None = None) -> np.ndarray:
    """Return how often each sample is drawn in each resample: (B, S), float64, rows summing to sample_size (or S)."""
    probabilities = np.full(num_samples, 1.0 / num_samples)
    rng = np.random.default_rng(seed)
    return rng.multinomial(sample_size or num_samples, probabilities, size=num_resamples).astype(np.float64)


def resampled_nfn(modules: Sequence[ModuleScore], samples: SampleTotals, counts_BS: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the NFN of every module in every resample, block by block: (b, M), float64, in the order of `modules`.

    NFN = (sum_s w_s gain_total_s / sum_s w_s num_tokens_s) / b(W) with w_s the draws of sample s; NaN where a module
    has no token in a resample. Raises ScoresError if `samples` lacks a module.
    """
    rows = samples.select(module.fqn for module in modules)
    gain_MS = rows.gain_total
    tokens_MS = rows.num_tokens.astype(np.float64)
    baseline_M = np.array([module.baseline for module in modules])
    # Dense modules all see the same tokens: one row of counts then serves them all.
    if (tokens_MS == tokens_MS[:1]).all():
        tokens_MS = tokens_MS[:1]
    block = max(1, _BLOCK_VALUES // len(modules))
    for start in range(0, len(counts_BS), block):
        counts_bS = counts_BS[start : start + block]
        gain_bM = counts_bS @ gain_MS.T
        tokens_bM = counts_bS @ tokens_MS.T
        with np.errstate(invalid="ignore", divide="ignore"):
            nfn_bM = gain_bM / tokens_bM / baseline_M
        nfn_bM[np.broadcast_to(tokens_bM == 0, nfn_bM.shape)] = np.nan
        yield nfn_bM


def group_means(nfn_bM: np.ndarray, group_M: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the mean NFN of each group over its modules that have one: (b, G), float64, NaN for none.

    nfn_bM: (b, M); group_M: (M,) integers, the group of each module, or -1 for a module in no group.
    """
    order = np.argsort(group_M, kind="stable")
    order = order[group_M[order] >= 0]
    values = nfn_bM[:, order]
    present = ~np.isnan(values)
    starts = np.searchsorted(group_M[order], np.arange(num_groups))
    totals = np.add.reduceat(np.where(present, values, 0.0), starts, axis=1)
    counts = np.add.reduceat(present, starts, axis=1, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def resample(
    modules: Sequence[ModuleScore],
    samples: SampleTotals,
    function: Callable[[np.ndarray], np.ndarray],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    sample_size: int | None = None,
) -> np.ndarray:
    """Return what a function of the NFN, (b, M) to (b, U), gives on every resample: (B, U).

    sample_size: draw so many samples per resample instead of all, to see what fewer would have given. Raises
    ScoresError if `samples` lacks a module.
    """
    counts_BS = draw_counts(len(samples.sample_ids), num_resamples, seed, sample_size)
    return np.concatenate([function(nfn_bM) for nfn_bM in resampled_nfn(modules, samples, counts_BS)])


def type_intervals(
    modules: Sequence[ModuleScore], samples: SampleTotals, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95% bootstrap interval (2.5% and 97.5% quantiles) of each type's mean NFN.

    A module without a token in a resample is left out of its type's mean there. Raises ScoresError if `samples` lacks
    a module.
    """
    types = sorted({module.type for module in modules})
    index = {name: position for position, name in enumerate(types)}
    group_M = np.array([index[module.type] for module in modules])
    means_BG = resample(modules, samples, lambda nfn_bM: group_means(nfn_bM, group_M, len(types)), num_resamples, seed)
    low_G, high_G = np.nanquantile(means_BG, [0.025, 0.975], axis=0)
    return {name: (float(low_G[i]), float(high_G[i])) for name, i in index.items()}


def selection_confidence(
    modules: Sequence[ModuleScore],
    samples: SampleTotals,
    policy: PolicyFunction,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> float:
    """Return the fraction of resamples in which the policy makes the same choice as on the scores themselves.

    policy: maps NFN (b, M), in the order of `modules`, to choices (b, U), bool, between any units;
    `plop_dist.choose.place.policy_function` builds one from a PlacementConfig.
    """
    reference_U = policy(np.array([[module.nfn for module in modules]]))[0]
    choices_BU = resample(modules, samples, policy, num_resamples, seed)
    return float((choices_BU == reference_U).all(axis=1).mean())
