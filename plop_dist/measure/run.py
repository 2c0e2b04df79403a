"""Scoring on one rank: baselines, then one pass over the samples, then the merge. No Ray, no framework."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch.distributed as dist

from plop_dist.choose.decision import selection_confidence
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.errors import ModelError, PlopError, WorkerError
from plop_dist.measure.aggregate import build_scores, score_modules
from plop_dist.measure.baseline import PassedSums, compute_baselines
from plop_dist.measure.collectives import Reducer, attempt
from plop_dist.measure.collector import Collector
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.measure.sums import add_totals
from plop_dist.rundir.progress import ProgressLog
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import Projection, Scores
from plop_dist.values.versions import versions

MIN_STABLE_SAMPLES = 16
STABLE_CONFIDENCE = 0.99
# How much more samples there must be before it is asked again whether the choice is stable: a bootstrap costs as much
# as it has samples, so that asking after every step would cost the square of their number.
STABLE_GROWTH = 1.04

# What a model's code raises about its inputs, wherever it looks at them: often behind its towers.
_OF_INPUTS = (TypeError, ValueError, AttributeError, KeyError, IndexError)

Notify = Callable[..., None]


def _quiet(kind: str, **fields: Any) -> None:
    pass


@dataclass(frozen=True)
class Pass:
    """What one scoring pass runs over, on this rank.

    steps: number of steps, the same on every rank; micro_batches(step) gives this rank's (maybe none);
    num_samples: over all ranks; samples_after(step): how many samples are done after a step (progress).
    """

    num_steps: int
    micro_batches: Callable[[int], Sequence[MicroBatch]]
    num_samples: int
    samples_after: Callable[[int], int]
    log: ProgressLog = field(default_factory=lambda: ProgressLog(None, "", 0))


def score_model(
    model: ScorableModel,
    run: Pass,
    *,
    estimator: EstimatorConfig,
    placement: PlacementConfig,
    info: dict[str, Any],
    notify: Notify = _quiet,
) -> Scores:
    """Return the scores, equal on every rank. Collective over the world.

    info: the `model`, `data` and `parallel` parts of scores.json. notify(kind, **fields) is told of progress.
    Raises DataError or ModelError, on every rank, for a micro-batch that the model cannot run exactly, and WorkerError
    naming rank and module when the model fails in the middle.
    """
    started = time.perf_counter()
    reducer = Reducer(model.groups)
    _, error = attempt(lambda: _check(model, run))
    reducer.gather_or_raise(None, error, "checking the batches")
    projections = reducer.merge_projections(model.sites)
    fqns = [projection.fqn for projection in projections]
    num_sites = len(model.sites)
    passing = getattr(model, "passing", None)
    passed = PassedSums(passing, estimator)

    @cache
    def baselines() -> dict[str, Baseline]:
        done_to = lambda done: notify("baseline", done=done, total=num_sites)  # noqa: E731
        return compute_baselines(model, estimator, reducer, fqns, done_to, passed.found)

    if passing is None:
        baselines()
    after_baselines = time.perf_counter()

    def is_stable(totals: SampleTotals) -> bool:
        return _is_stable(projections, totals, baselines(), placement)

    stop = is_stable if estimator.stop_when_stable else None
    with passed.attached():
        found = _collect(Collector(model, reducer), run, fqns, stop, notify)
    totals = found.totals.observed()
    baselines()
    timing = {
        "baseline_seconds": round(after_baselines - started, 3),
        "forward_seconds": round(time.perf_counter() - after_baselines, 3),
        "num_collectives": reducer.traffic.num_collectives,
        "num_reduced_bytes": reducer.traffic.num_bytes,
    }
    data = {**info["data"], "num_samples": found.num_samples, "stopped_early": found.num_samples < run.num_samples}
    data["num_tokens"] = _num_tokens(run, found.num_steps, reducer) or _most_tokens(projections, totals)
    return build_scores(
        projections,
        totals,
        baselines(),
        unknown=found.unknown,
        model=info["model"],
        data=data,
        estimator=estimator.model_dump(),
        parallel=info["parallel"],
        versions=versions(),
        timing=timing,
    )


def _most_tokens(projections: Sequence[Projection], totals: SampleTotals) -> int:
    """Return how many tokens of text the widest-fed module saw; what towers see is counted in their modules."""
    of_text = {projection.fqn for projection in projections if projection.part == "language"}
    per_module_M = (totals.num_tokens + totals.num_skipped).sum(axis=1)
    return int(max((per_module_M[i] for i, fqn in enumerate(totals.fqns) if fqn in of_text), default=0))


def _check(model: ScorableModel, run: Pass) -> None:
    for step in range(run.num_steps):
        for micro_batch in run.micro_batches(step):
            model.check(micro_batch)


def _num_tokens(run: Pass, num_steps: int, reducer: Reducer) -> int | None:
    """Return how many tokens the batches of these steps hold, or None for batches that do not say. Collective.

    Not what a module sees, which may be called several times for a token, or never.
    """
    ids = [micro_batch.sample_ids for step in range(num_steps) for micro_batch in run.micro_batches(step)]
    own = None if any(one.dim() == 1 for one in ids) else sum(int((one >= 0).sum()) for one in ids)
    counts = dict(reducer.gather_objects((reducer.groups.replica, own), "count of tokens"))
    return None if None in counts.values() else sum(filter(None, counts.values()))


@dataclass(frozen=True)
class _Collected:
    """What the steps gave, merged over all ranks. unknown: weights that multiply activations without a site."""

    totals: SampleTotals
    num_samples: int
    num_steps: int
    unknown: tuple[Projection, ...]


def _collect(
    collector: Collector,
    run: Pass,
    fqns: Sequence[str],
    is_stable: Callable[[SampleTotals], bool] | None,
    notify: Notify,
) -> _Collected:
    """Return the sums of all ranks over all steps, or until `is_stable`. Collective.

    The first steps come from the log where it has them; the last always runs, and shows which weights have no site.
    """
    reducer = collector.reducer
    step = _agreed_start(run, reducer)
    parts = run.log.read(step)  # this rank's sums that are not merged yet
    merged: list[SampleTotals] = []  # those of all ranks
    num_used = next_check = 0
    unknown: tuple[Projection, ...] | None = None
    if step:
        num_used = run.samples_after(step - 1)
        notify("resumed", done=num_used, total=run.num_samples)
    with collector.attached():
        while step < run.num_steps:
            if unknown is None:
                with collector.model.watching() as seen:
                    parts.append(_step(collector, run, step))
                unknown = reducer.merge_unknown(seen)
            else:
                parts.append(_step(collector, run, step))
            run.log.write(step, parts[-1])
            num_used = run.samples_after(step)
            step += 1
            notify("scoring", done=num_used, total=run.num_samples, step=step)
            if is_stable and step < run.num_steps and num_used >= max(MIN_STABLE_SAMPLES, next_check):
                merged.append(_merge_seen(reducer, add_totals(parts, collector.owned), fqns))
                parts, next_check = [], num_used * STABLE_GROWTH
                if is_stable(add_totals(merged, fqns)):
                    notify("stable", done=num_used, total=run.num_samples, confidence=STABLE_CONFIDENCE)
                    break
        else:
            num_used = run.num_samples
    if parts or not merged:
        merged.append(reducer.merge_totals(add_totals(parts, collector.owned), fqns, np.arange(run.num_samples)))
    return _Collected(add_totals(merged, fqns), num_used, step, unknown or ())


def _agreed_start(run: Pass, reducer: Reducer) -> int:
    done = min(reducer.gather_objects(run.log.num_done(), "agreement on the first step"))
    return max(0, min(done, run.num_steps - 1))


def _merge_seen(reducer: Reducer, owned: SampleTotals, fqns: Sequence[str]) -> SampleTotals:
    """Return the totals of all ranks for the samples that any of them has seen. Collective over the world."""
    seen = reducer.gather_objects(owned.sample_ids, "samples of these steps")
    return reducer.merge_totals(owned, fqns, np.unique(np.concatenate(seen)))


def _step(collector: Collector, run: Pass, step: int) -> SampleTotals:
    micro_batches = run.micro_batches(step)
    try:
        return collector.step(micro_batches) if micro_batches else add_totals([], collector.owned)
    except PlopError:
        raise
    except Exception as error:
        if isinstance(error, _OF_INPUTS) and not _is_raised_in_hooks(error):
            where = f" (step {step + 1}, after module '{collector.last_site}')" if collector.last_site else ""
            raise ModelError(
                f"the model does not run on the batches as they are{where}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Give it what it asks for (plop_dist.score takes further keys), or choose a "
                "model that reads text alone."
            ) from error
        this_rank = dist.get_rank() if dist.is_initialized() else 0
        raise WorkerError(
            f"rank {this_rank}: scoring step {step + 1} of {run.num_steps} failed after module "
            f"'{collector.last_site or 'no module yet'}': {type(error).__name__}: {error}"
        ) from error


def _is_raised_in_hooks(error: Exception) -> bool:
    """Tell whether an error of a forward pass comes from our own code that the model calls, or below it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_ours = [
        frame.f_globals.get("__name__", "").partition(".")[0] == "plop_dist"
        and frame.f_code.co_name != "__torch_function__"  # which only passes on what the model asks torch for
        for frame in frames
    ]
    outside = is_ours.index(False) if False in is_ours else 0
    return any(is_ours[outside:])


def _is_stable(
    projections: Sequence[Projection],
    totals: SampleTotals,
    baselines: Mapping[str, Baseline],
    placement: PlacementConfig,
) -> bool:
    """Tell whether the same modules are chosen in 99% of bootstrap resamples; the same answer on every rank."""
    modules, _ = score_modules(projections, totals, baselines)
    samples = totals.observed().select(module.fqn for module in modules)
    return selection_confidence(modules, samples, placement) >= STABLE_CONFIDENCE
