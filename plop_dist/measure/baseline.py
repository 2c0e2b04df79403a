"""The baseline b(W) of every projection, computed once per weight, whatever shards it.

What ranks hold of a weight is summed up locally (weight_sums) and completed over the feature group. Ranks that hold
copies of the same weights share the work, and a parameter in which several projections lie is gathered once.
"""

# M modules

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import Groups, PassingWeights, Site, Sited, WeightHolder
from plop_dist.measure.weight_sums import WeightSums, compute_sums

_CHUNK_BYTES = 64 << 20  # how much of the row-parallel vectors is kept before they are reduced together


@dataclass(frozen=True)
class Taken:
    """One projection's sums before the reduction over its feature group."""

    fqn: str
    group: str
    is_sharded: bool
    sums: WeightSums

    @property
    def num_bytes(self) -> int:
        """How much of it is to be communicated."""
        return sum(part.numel() * part.element_size() for part in self.sums.parts) if self.is_sharded else 0


class PassedSums:
    """The sums of weights that are there only while their modules run, each taken when it first comes by."""

    def __init__(self, passing: PassingWeights | None, estimator: EstimatorConfig) -> None:
        self.found: dict[Site, list[Taken]] = {}
        self._passing, self._estimator = passing, estimator

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take what comes by for the length of a block."""
        remove = self._passing.attach(self._take) if self._passing is not None else lambda: None
        try:
            yield
        finally:
            remove()

    def _take(self, site: Site) -> None:
        if site not in self.found:
            self.found[site] = _take(site, self._estimator)


def compute_baselines(
    model: Sited,
    estimator: EstimatorConfig,
    reducer: Reducer,
    fqns: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
    passed: Mapping[Site, Sequence[Taken]] = MappingProxyType({}),
) -> dict[str, Baseline]:
    """Return b(W) of every path in `fqns`, on every rank. Collective over the world.

    A weight with NaN or infinite entries gives a Baseline whose value is NaN; a zero weight gives 0.
    `advance` is told how many sites are done (progress). passed: the sums of sites that have been taken in passing
    (PassedSums).
    """
    found: dict[str, Baseline] = {}
    pending: list[Taken] = []
    num_bytes = done = 0
    for holder, sites in _by_holder(model.sites, model.groups):
        is_needed = holder is not None and not all(site in passed for site, _ in sites)
        with holder.opened() if holder is not None and is_needed else nullcontext():
            for site, is_mine in sites:
                taken = passed[site] if site in passed else _take(site, estimator, is_mine=is_mine)
                pending += taken if is_mine else ()
                num_bytes += sum(item.num_bytes for item in taken)
                if num_bytes > _CHUNK_BYTES:
                    found |= _settle(pending, reducer)
                    pending, num_bytes = [], 0
                done += 1
                advance(done)
    found |= _settle(pending, reducer)
    return _merge(found, reducer, fqns)


def _take(site: Site, estimator: EstimatorConfig, *, is_mine: bool = True) -> list[Taken]:
    """Return the sums of a site's weights; of one that another rank reads none. Collective as site.weights() is."""
    with site.weights() as weights:
        return [
            Taken(weight.projection.fqn, site.group, weight.is_sharded, compute_sums(weight, estimator))
            for weight in (weights if is_mine else ())
        ]


def _by_holder(sites: Sequence[Site], groups: Groups) -> Iterator[tuple[WeightHolder | None, list[tuple[Site, bool]]]]:
    """Yield each holder once, with the sites that share it; a site that shares nothing alone.

    Beside each site: whether its weights are this rank's to sum up, and not those of another that holds copies of them.
    """
    shared: dict[int, tuple[WeightHolder | None, list[tuple[Site, bool]]]] = {}
    for number, site in enumerate(sites):
        index, count = groups.copies.get(site.group, (0, 1))
        key = id(site if site.holder is None else site.holder)
        shared.setdefault(key, (site.holder, []))[1].append((site, number % count == index))
    yield from shared.values()


def _settle(pending: Sequence[Taken], reducer: Reducer) -> dict[str, Baseline]:
    """Return the finished baselines: one collective per feature group and dtype for all that are pending."""
    whole = [list(item.sums.parts) for item in pending]
    for name in dict.fromkeys(item.group for item in pending if item.is_sharded):
        members = [place for place, item in enumerate(pending) if item.is_sharded and item.group == name]
        for dtype in (torch.float64, torch.float32):
            slots = [(place, k) for place in members for k, part in enumerate(whole[place]) if part.dtype is dtype]
            parts = [whole[place][k] for place, k in slots]
            group = reducer.groups.features.get(name)
            summed = reducer.sum_flat(parts, group, "sum of baselines over feature shards") if group else parts
            for (place, k), total in zip(slots, summed, strict=True):
                whole[place][k] = total
    return {
        item.fqn: item.sums.finish(parts)
        for item, parts in zip(pending, whole, strict=True)
        if reducer.is_owner(item.group)
    }


def _merge(found: dict[str, Baseline], reducer: Reducer, fqns: Sequence[str]) -> dict[str, Baseline]:
    # Copies of an expert may be computed by more than one rank: their sum is divided by how many there are.
    row = {fqn: index for index, fqn in enumerate(fqns)}
    table_M4 = torch.zeros(len(fqns), 4, dtype=torch.float64)
    if found:
        is_bad = [math.isnan(baseline.value) for baseline in found.values()]
        entries = [
            (0.0, 0.0, 1.0, 1.0) if bad else (baseline.value, baseline.stderr, 1.0, 0.0)
            for bad, baseline in zip(is_bad, found.values(), strict=True)
        ]
        table_M4[[row[fqn] for fqn in found]] = torch.tensor(entries, dtype=torch.float64)
    merged: Tensor = reducer.sum_world(table_M4, "merge of baselines")
    return {
        fqn: Baseline(math.nan, 0.0) if bad else Baseline(value / count, stderr / count)
        for fqn, (value, stderr, count, bad) in zip(fqns, merged.tolist(), strict=True)
    }
