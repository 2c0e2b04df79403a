"""How sure the scores are: calibration samples drawn again with replacement, exactly, from the per-sample sums."""

# M modules, S samples, B resamples, b resamples of one block, G groups (types or other units), D distinct rows

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import ModuleScore

NUM_RESAMPLES = 1000
_BLOCK_VALUES = 1_000_000  # float64 values per (b, M) block: 8 MB, whatever the model's size; threads keep a few
_CHUNK_VALUES = 1 << 17  # of a block, worked on at once: 1 MB stays in a core's cache
_NUM_THREADS = 2


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
    index_M = samples.rows_of(module.fqn for module in modules)
    baseline_M = np.array([module.baseline for module in modules])
    gain_MS = samples.gain_total[index_M]
    tokens_DS, row_M = _distinct_rows(samples.num_tokens, index_M)

    def add_up(counts_bS: np.ndarray) -> np.ndarray:
        nfn_bM = counts_bS @ gain_MS.T
        _divide(nfn_bM, counts_bS @ tokens_DS.T, row_M, baseline_M)
        return nfn_bM

    block = max(1, _BLOCK_VALUES // len(modules))
    return _ahead(add_up, (counts_BS[start : start + block] for start in range(0, len(counts_BS), block)))


def _ahead(function: Callable[[np.ndarray], np.ndarray], blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield a function of each block, in their order, while threads work on the next ones; few are kept at a time.

    NumPy lets go of the interpreter while it computes.
    """
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for block in blocks:
            pending.append(pool.submit(function, block))
            if len(pending) > _NUM_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _divide(gain_bM: np.ndarray, tokens_bD: np.ndarray, row_M: np.ndarray, baseline_M: np.ndarray) -> None:
    """Divide sums of gains by their numbers of tokens and by the baselines, in place; NaN where there is no token."""
    has_gaps = bool((tokens_bD == 0).any())
    for columns in _chunks(gain_bM):
        part = gain_bM[:, columns]
        tokens = tokens_bD[:, row_M[columns]] if tokens_bD.shape[1] > 1 else tokens_bD
        with np.errstate(invalid="ignore", divide="ignore"):
            part /= tokens
            part /= baseline_M[columns]
        if has_gaps:
            part[np.broadcast_to(tokens == 0, part.shape)] = np.nan


def _chunks(block_bM: np.ndarray) -> Iterator[slice]:
    width = max(1, _CHUNK_VALUES // len(block_bM))
    return (slice(start, start + width) for start in range(0, block_bM.shape[1], width))


def _distinct_rows(tokens: np.ndarray, index_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ones among the rows index_M, (D, S) float64, and which of them each module has: (M,).

    Dense modules all see the same tokens, and so do the projections of one expert: what is the same for several
    modules is added up once.
    """
    weights_S = np.random.default_rng(0).random(tokens.shape[1])
    num_rows = max(1, _CHUNK_VALUES // tokens.shape[1])
    parts = [index_M[start : start + num_rows] for start in range(0, len(index_M), num_rows)]
    key_M = np.concatenate([tokens[part].astype(np.float64) @ weights_S for part in parts])
    _, first_D, row_M = np.unique(key_M, return_index=True, return_inverse=True)
    same_M = index_M[first_D[row_M]]  # a row with the same key; with the same values unless chance will have it
    others = [same_M[start : start + num_rows] for start in range(0, len(index_M), num_rows)]
    if not all(np.array_equal(tokens[part], tokens[other]) for part, other in zip(parts, others, strict=True)):
        return tokens[index_M].astype(np.float64), np.arange(len(index_M))
    return tokens[index_M[first_D]].astype(np.float64), row_M


def round_scores(values_bU: np.ndarray) -> np.ndarray:
    """Round in place to 12 decimals, so that equal scores tie whatever the order of their summation; return it."""
    for columns in _chunks(values_bU):
        part = values_bU[:, columns]
        np.round(part, 12, out=part)
    return values_bU


def group_means(nfn_bM: np.ndarray, group_M: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the mean NFN of each group over its modules that have one: (b, G), float64, NaN for none.

    nfn_bM: (b, M); group_M: (M,) integers, the group of each module, or -1 for a module in no group.
    """
    order = np.argsort(group_M, kind="stable")
    order = order[group_M[order] >= 0]
    values = nfn_bM if np.array_equal(order, np.arange(nfn_bM.shape[1])) else nfn_bM[:, order]
    if len(order) == num_groups:  # each group is one module
        return values
    starts = np.searchsorted(group_M[order], np.arange(num_groups))
    absent = np.isnan(values)
    if not absent.any():
        return np.add.reduceat(values, starts, axis=1) / np.diff(starts, append=len(order))
    totals = np.add.reduceat(np.where(absent, 0.0, values), starts, axis=1)
    counts = np.add.reduceat(~absent, starts, axis=1, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


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
    counts_BS = draw_counts(len(samples.sample_ids), num_resamples, seed)
    blocks = resampled_nfn(modules, samples, counts_BS)
    means_BG = np.concatenate([group_means(nfn_bM, group_M, len(types)) for nfn_bM in blocks])
    low_G, high_G = np.nanquantile(means_BG, [0.025, 0.975], axis=0)
    return {name: (float(low_G[i]), float(high_G[i])) for name, i in index.items()}
