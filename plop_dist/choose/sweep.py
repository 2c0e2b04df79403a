"""What other k, and fewer samples, would have chosen: from the per-sample sums alone, without a model."""

# M scored modules, U units, B resamples, S samples

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plop_dist.choose.bootstrap import resample, resampled_nfn
from plop_dist.choose.candidates import Candidates, find_candidates
from plop_dist.choose.place import choose_units
from plop_dist.choose.policies import build_policy, choose_first, cost_function, rank_function, resolve_policy
from plop_dist.config.schema import PlacementConfig
from plop_dist.values.scores import SampleTotals, Scores

_MAX_ROWS = 40  # of k: all of them for types, evenly spread ones for hundreds of modules


@dataclass(frozen=True)
class ByK:
    """The k lowest units; `added` is the k-th alone; confidence as in selection_confidence, None without samples."""

    k: int
    added: str
    nfn: float
    num_modules: int
    num_parameters: int
    confidence: float | None


@dataclass(frozen=True)
class BySamples:
    """What the first num_samples samples choose, and P(so many samples drawn anew make the final choice)."""

    num_samples: int
    units: tuple[str, ...]
    is_final_choice: bool
    agreement: float


@dataclass(frozen=True)
class Sweep:
    """by_k: k = 1 to all units; by_samples: empty without per-sample sums. choice: what the policy itself chooses."""

    granularity: str
    choice: tuple[str, ...]
    by_k: tuple[ByK, ...]
    by_samples: tuple[BySamples, ...]


def sweep(scores: Scores, policy: PlacementConfig | str | None = None, **options: Any) -> Sweep:
    """Return the choices for every k and for fewer samples, under the candidates and ranks of a policy.

    Arguments and errors are those of `place`, except that k may be anything.
    """
    config = resolve_policy(policy, **options)
    candidates = find_candidates(scores.modules, config, scores.left_out)
    config = config.model_copy(update={"k": min(config.k, len(candidates.units))})
    chosen_U = choose_units(candidates, build_policy(candidates, config))
    return Sweep(
        granularity=config.granularity,
        choice=_names(candidates, chosen_U, _values(candidates)),
        by_k=tuple(_by_k(scores, candidates, config)),
        by_samples=() if scores.samples is None else tuple(_by_samples(scores.samples, candidates, config, chosen_U)),
    )


def _values(candidates: Candidates) -> np.ndarray:
    return candidates.values(np.array([[module.nfn for module in candidates.modules]]))[0]


def _names(candidates: Candidates, chosen_U: np.ndarray, values_U: np.ndarray) -> tuple[str, ...]:
    order = np.argsort(values_U, kind="stable")
    return tuple(candidates.units[unit] for unit in order if chosen_U[unit])


def _by_k(scores: Scores, candidates: Candidates, config: PlacementConfig) -> list[ByK]:
    sign = -1.0 if config.policy == "highest_k" else 1.0
    values_U = _values(candidates)
    values_BU = None if scores.samples is None else resample(scores.modules, scores.samples, candidates.values)
    cost = cost_function(candidates, rank_function(config))
    order = np.argsort(sign * values_U, kind="stable")
    num_units = len(order)
    rows = []
    for k in np.unique(np.linspace(1, num_units, min(num_units, _MAX_ROWS)).astype(int)).tolist():
        chosen_U = choose_first(sign * values_U[None], k)[0]
        confidence = None
        if values_BU is not None:
            confidence = float((choose_first(sign * values_BU, k) == chosen_U).all(axis=1).mean())
        last = int(order[k - 1])
        num_modules = len(candidates.members(chosen_U))
        rows.append(ByK(k, candidates.units[last], float(values_U[last]), num_modules, cost(order[:k]), confidence))
    return rows


def _by_samples(
    samples: SampleTotals, candidates: Candidates, config: PlacementConfig, chosen_U: np.ndarray
) -> list[BySamples]:
    choose = build_policy(candidates, config)
    num_samples = len(samples.sample_ids)
    position_S = np.argsort(np.argsort(samples.sample_ids, kind="stable"))
    sizes = sorted({min(2**power, num_samples) for power in range(num_samples.bit_length() + 1)})
    counts = np.array([position_S < size for size in sizes], dtype=np.float64)
    nfn = np.concatenate(list(resampled_nfn(candidates.modules, samples, counts)))
    rows = []
    for size, nfn_M, choice_U in zip(sizes, nfn, choose(nfn), strict=True):
        drawn_BU = resample(candidates.modules, samples, choose, sample_size=size)
        rows.append(
            BySamples(
                num_samples=size,
                units=_names(candidates, choice_U, candidates.values(nfn_M[None])[0]),
                is_final_choice=bool((choice_U == chosen_U).all()),
                agreement=float((drawn_BU == chosen_U).all(axis=1).mean()),
            )
        )
    return rows
