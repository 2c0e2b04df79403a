"""The baseline b(W) of every projection, computed once per weight, whatever shards it.

Column-parallel: the squared norms ||W_r u||^2 add up over the group. Row-parallel: one u is sliced by in_features and
the vectors W_r u_r are added before the norm. Ranks that hold copies of the same weights share the work.
"""

# I in_features, O out_features, K directions, M modules

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure import norms
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import LocalWeight, ScorableModel
from plop_dist.values.scores import Projection

_CHUNK_BYTES = 64 << 20  # how much of the row-parallel vectors is kept before they are reduced together


@dataclass(frozen=True)
class _Pending:
    """One projection's sums before the reduction: squares that add up (S,), and vectors that add up (any shape)."""

    projection: Projection
    group: str
    is_sharded: bool
    sums: tuple[Tensor, ...]
    finish: Callable[[Sequence[Tensor]], Baseline]


def compute_baselines(
    model: ScorableModel,
    estimator: EstimatorConfig,
    reducer: Reducer,
    fqns: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Baseline]:
    """Return b(W) of every path in `fqns`, on every rank. Collective over the world.

    A weight with NaN or infinite entries gives a Baseline whose value is NaN; a zero weight gives 0.
    `advance` is told how many sites are done (progress).
    """
    found: dict[str, Baseline] = {}
    pending: list[_Pending] = []
    for done, site in enumerate(model.sites):
        index, count = model.groups.copies.get(site.group, (0, 1))
        with site.weights() as weights:
            if done % count == index:
                pending += [_project(weight, site.group, estimator) for weight in weights]
        if sum(t.numel() * t.element_size() for item in pending for t in item.sums if item.is_sharded) > _CHUNK_BYTES:
            found |= _settle(pending, reducer)
            pending = []
        advance(done + 1)
    found |= _settle(pending, reducer)
    return _merge(found, reducer, fqns)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)  # a host's autocast must not round what belongs to the weight alone
def _project(weight: LocalWeight, group: str, estimator: EstimatorConfig) -> _Pending:
    projection = weight.projection
    w_OI = weight.weight_OI.detach().to(torch.float32)
    if not w_OI.isfinite().all():
        w_OI = torch.full_like(w_OI, math.nan)  # one clear NaN, on whatever rank it is, reaches every sum
    is_row = weight.is_sharded and weight.in_index is not None
    weight_sq = w_OI.square().sum(dtype=torch.float64)[None]
    in_features = projection.in_features
    if estimator.baseline == "closed_form":
        return _Pending(
            projection,
            group,
            weight.is_sharded,
            (weight_sq,),
            lambda sums: _checked(sums[0], lambda fro: norms.closed_form(fro, in_features)),
        )
    if estimator.baseline == "exact":
        w = w_OI.double()
        gram = w @ w.T if is_row or (not weight.is_sharded and w.shape[0] < w.shape[1]) else w.T @ w
        return _Pending(
            projection,
            group,
            weight.is_sharded,
            (weight_sq, gram),
            lambda sums: _checked(sums[0], lambda _: norms.exact(sums[1], in_features)),
        )
    u_KI = norms.directions(estimator.seed, projection.fqn, estimator.num_directions, in_features)
    if is_row:
        u_KI = u_KI[:, weight.in_index]
    wu_OK = w_OI @ u_KI.T.to(w_OI.device)
    partial = wu_OK if is_row else wu_OK.double().square().sum(dim=0)

    def finish(sums: Sequence[Tensor]) -> Baseline:
        x_K = sums[1].double().square().sum(dim=0) if is_row else sums[1]
        if estimator.baseline == "gaussian":
            return _checked(sums[0], lambda _: norms.gaussian(x_K))
        return _checked(sums[0], lambda fro: norms.control_variate(x_K, fro, in_features))

    return _Pending(projection, group, weight.is_sharded, (weight_sq, partial), finish)


def _checked(weight_sq: Tensor, estimate: Callable[[float], Baseline]) -> Baseline:
    value = float(weight_sq)
    if not math.isfinite(value):
        return Baseline(math.nan, 0.0)
    return estimate(value) if value > 0 else Baseline(0.0, 0.0)


def _settle(pending: Sequence[_Pending], reducer: Reducer) -> dict[str, Baseline]:
    """Return the finished baselines: one collective per feature group and dtype for all that are pending."""
    whole = {id(item): list(item.sums) for item in pending}
    for name in dict.fromkeys(item.group for item in pending if item.is_sharded):
        members = [item for item in pending if item.is_sharded and item.group == name]
        for dtype in (torch.float64, torch.float32):
            slots = [(item, k) for item in members for k, part in enumerate(item.sums) if part.dtype is dtype]
            parts = [item.sums[k] for item, k in slots]
            group = reducer.groups.features.get(name)
            summed = reducer.sum_flat(parts, group, "sum of baselines over feature shards") if group else parts
            for (item, k), total in zip(slots, summed, strict=True):
                whole[id(item)][k] = total
    return {item.projection.fqn: item.finish(whole[id(item)]) for item in pending if reducer.is_owner(item.group)}


def _merge(found: dict[str, Baseline], reducer: Reducer, fqns: Sequence[str]) -> dict[str, Baseline]:
    # Copies of an expert may be computed by more than one rank: their sum is divided by how many there are.
    table_M3 = torch.zeros(len(fqns), 4, dtype=torch.float64)
    row = {fqn: index for index, fqn in enumerate(fqns)}
    for fqn, baseline in found.items():
        is_bad = math.isnan(baseline.value)
        entry = [0.0, 0.0, 1.0, 1.0] if is_bad else [baseline.value, baseline.stderr, 1.0, 0.0]
        table_M3[row[fqn]] = torch.tensor(entry, dtype=torch.float64)
    merged = reducer.sum_world(table_M3, "merge of baselines").tolist()
    return {
        fqn: Baseline(math.nan, 0.0) if bad else Baseline(value / count, stderr / count)
        for fqn, (value, stderr, count, bad) in zip(fqns, merged, strict=True)
    }
