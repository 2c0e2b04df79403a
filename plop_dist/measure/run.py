"""Scoring on one rank: baselines, then one pass over the samples, then the merge. No Ray, no framework."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from plop_dist.choose.decision import selection_confidence
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.errors import PlopError, WorkerError
from plop_dist.measure.aggregate import build_scores, score_modules
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer, attempt
from plop_dist.measure.collector import Collector, add_totals
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.rundir.progress import ProgressLog
from plop_dist.values.scores import Scores
from plop_dist.values.versions import versions

MIN_STABLE_SAMPLES = 16
STABLE_CONFIDENCE = 0.99

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
    local = [projection for site in model.sites for projection in site.projections]
    projections = reducer.merge_projections(local)
    fqns = [projection.fqn for projection in projections]
    num_sites = len(model.sites)
    baselines = compute_baselines(
        model, estimator, reducer, fqns, lambda done: notify("baseline", done=done, total=num_sites)
    )
    after_baselines = time.perf_counter()

    collector = Collector(model, reducer)
    done = _agreed_start(run.log, reducer)
    parts = run.log.read(done)
    if done:
        notify("resumed", done=run.samples_after(done - 1), total=run.num_samples)
    num_used = run.num_samples
    step = done
    with collector.attached():
        while step < run.num_steps:
            totals = _step(collector, run, step)
            run.log.write(step, totals)
            parts.append(totals)
            num_used = run.samples_after(step)
            notify("scoring", done=num_used, total=run.num_samples, step=step + 1)
            step += 1
            if estimator.stop_when_stable and num_used >= MIN_STABLE_SAMPLES and step < run.num_steps:
                merged = reducer.merge_totals(add_totals(parts, collector.owned), fqns, run.num_samples)
                if _is_stable(projections, merged, baselines, placement):
                    notify("stable", done=num_used, total=run.num_samples, confidence=STABLE_CONFIDENCE)
                    break
        else:
            num_used = run.num_samples
    merged = reducer.merge_totals(add_totals(parts, collector.owned), fqns, run.num_samples)
    merged = merged.observed()
    ended = time.perf_counter()
    timing = {
        "baseline_seconds": round(after_baselines - started, 3),
        "forward_seconds": round(ended - after_baselines, 3),
        "num_collectives": reducer.traffic.num_collectives,
        "num_reduced_bytes": reducer.traffic.num_bytes,
    }
    data = {**info["data"], "num_samples": num_used, "stopped_early": num_used < run.num_samples}
    data["num_tokens"] = int((merged.num_tokens + merged.num_skipped).sum(axis=1).max())
    return build_scores(
        projections,
        merged,
        baselines,
        model=info["model"],
        data=data,
        estimator=estimator.model_dump(),
        parallel=info["parallel"],
        versions=versions(),
        timing=timing,
    )


def _check(model: ScorableModel, run: Pass) -> None:
    for step in range(run.num_steps):
        for micro_batch in run.micro_batches(step):
            model.check(micro_batch)


def _agreed_start(log: ProgressLog, reducer: Reducer) -> int:
    return min(reducer.gather_objects(log.num_done(), "agreement on the first step"))


def _step(collector: Collector, run: Pass, step: int) -> Any:
    micro_batches = run.micro_batches(step)
    try:
        return collector.step(micro_batches) if micro_batches else add_totals([], collector.owned)
    except PlopError:
        raise
    except Exception as error:
        this_rank = dist.get_rank() if dist.is_initialized() else 0
        raise WorkerError(
            f"rank {this_rank}: scoring step {step + 1} of {run.num_steps} failed after module "
            f"'{collector.last_site}': {type(error).__name__}: {error}"
        ) from error


def _is_stable(projections: Any, merged: Any, baselines: Any, placement: PlacementConfig) -> bool:
    """Tell whether the same modules are chosen in 99% of bootstrap resamples; the same answer on every rank."""
    modules, _ = score_modules(projections, merged, baselines)
    samples = merged.observed().select(module.fqn for module in modules)
    return selection_confidence(modules, samples, placement) >= STABLE_CONFIDENCE
