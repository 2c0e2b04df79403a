"""The scores: sums per (module, sample) and baselines put together into NFN per module and per type."""

# M modules, S samples

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plop_dist.choose.bootstrap import type_intervals
from plop_dist.errors import DataError, ModelError, NonFiniteWeightsError
from plop_dist.measure.norms import Baseline
from plop_dist.values.scores import (
    SCORES_SCHEMA,
    DataInfo,
    LeftOut,
    ModelInfo,
    ModuleScore,
    Projection,
    SampleTotals,
    Scores,
    TypeScore,
)


def score_modules(
    projections: Sequence[Projection], totals: SampleTotals, baselines: Mapping[str, Baseline]
) -> tuple[tuple[ModuleScore, ...], tuple[LeftOut, ...]]:
    """Return the score of every projection that has one, and why the others have none.

    nfn = (sum_t gain_t / num_tokens) / b(W): each real token counts once, whatever batch it was in.
    """
    scored, left_out = [], []
    arrays = (totals.gain_total, totals.num_tokens, totals.num_skipped)
    sums = [np.ascontiguousarray(array).sum(axis=1).tolist() for array in arrays]
    for projection, gain_total, num_tokens, num_skipped in zip(projections, *sums, strict=True):
        baseline = baselines[projection.fqn]
        known = projection.model_dump()
        reason = _reason(baseline, num_tokens, num_skipped, gain_total)
        if reason is not None:
            left_out.append(LeftOut(**known, reason=reason, num_skipped_tokens=num_skipped))
            continue
        gain = gain_total / num_tokens
        scored.append(
            ModuleScore(
                **known,
                num_tokens=num_tokens,
                num_skipped_tokens=num_skipped,
                gain=gain,
                baseline=baseline.value,
                baseline_stderr=baseline.stderr,
                nfn=gain / baseline.value,
            )
        )
    return tuple(scored), tuple(left_out)


def build_scores(
    projections: Sequence[Projection],
    totals: SampleTotals,
    baselines: Mapping[str, Baseline],
    *,
    unknown: Sequence[Projection] = (),
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    estimator: Mapping[str, Any],
    parallel: Mapping[str, Any],
    versions: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> Scores:
    """Return the Scores of a finished collection; deterministic, so that every rank builds the same.

    unknown: weights that multiply activations though no site holds them.
    Raises NonFiniteWeightsError, ModelError or DataError when not one module could be scored.
    """
    modules, left_out = score_modules(projections, totals, baselines)
    if not modules:
        bad = [entry.fqn for entry in left_out if entry.reason == "non_finite_weights"]
        if bad:
            raise NonFiniteWeightsError(f"every scored module has NaN or infinite weights, e.g. '{bad[0]}'.")
        if all(entry.reason == "not_per_token" for entry in left_out):
            raise ModelError(
                f"{model.get('architecture')} shows its modules other activations than one per token of the batch, "
                f"e.g. '{left_out[0].fqn}'; only causal language models that keep the batch's tokens can be scored."
            )
        raise DataError(
            f"none of the {len(projections)} modules saw a token with finite, non-zero activations; check the data "
            "and the weights."
        )
    samples = totals.select(module.fqn for module in modules)
    by_type: dict[str, list[float]] = {}
    for module in modules:
        by_type.setdefault(module.type, []).append(module.nfn)
    intervals = type_intervals(modules, samples) if len(samples.sample_ids) > 1 else {}
    types = [
        TypeScore(type=name, num_modules=len(values), nfn=math.fsum(values) / len(values), nfn_ci95=intervals.get(name))
        for name, values in by_type.items()
    ]
    scores = Scores(
        schema=SCORES_SCHEMA,
        model=ModelInfo(**model),
        data=DataInfo(**data),
        estimator=dict(estimator),
        parallel=dict(parallel),
        modules=modules,
        types=tuple(sorted(types, key=lambda entry: (entry.nfn, entry.type))),
        left_out=(*left_out, *(LeftOut(**one.model_dump(), reason="unknown_kind") for one in unknown)),
        versions=dict(versions),
        timing=dict(timing),
    )
    return scores.with_samples(samples)


def check_weights(scores: Scores) -> None:
    """Raise NonFiniteWeightsError naming the modules that were left out because their weights are not finite."""
    bad = [entry.fqn for entry in scores.left_out if entry.reason == "non_finite_weights"]
    if bad:
        shown = ", ".join(f"'{fqn}'" for fqn in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NonFiniteWeightsError(
            f"weights of {shown} hold NaN or infinity; they were left out of scores.json, which holds the "
            f"other {len(scores.modules)} modules. Modules fed by them may be skipped too; repair the checkpoint."
        )


def _reason(baseline: Baseline, num_tokens: int, num_skipped: int, gain_total: float) -> Any:
    if math.isnan(baseline.value):
        return "non_finite_weights"
    if baseline.value <= 0:
        return "zero_weights"
    if math.isnan(gain_total):
        return "not_per_token"
    if num_tokens == 0:
        return "non_finite_activations" if num_skipped else "no_tokens"
    return None
