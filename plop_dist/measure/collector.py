"""Which gains each module shows on each sample: hooks note local squared norms, one reduction completes them.

During a forward pass the hooks only append to lists. After it, one stacked collective per feature group and
micro-batch makes the norms whole, and the gains are added up per (module, sample) in float64.
"""

# T tokens, N all tokens of all modules, M modules, S samples, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from plop_dist.measure.collectives import Reducer
from plop_dist.measure.norms import gains, local_sq_norm
from plop_dist.measure.note_storage import NoteStorage
from plop_dist.measure.protocols import MicroBatch, Part, Routing, ScorableModel, Site
from plop_dist.measure.sums import add_totals, to_totals
from plop_dist.measure.token_samples import TokenSamples
from plop_dist.values.sample_totals import SampleTotals


@dataclass(slots=True)
class _Call:
    """One call of one site: its squared norms, local until completed unless `in_part` and `out_part` say WHOLE."""

    site: Site
    in_sq_T: Tensor
    out_sq: list[Tensor]
    in_part: Part
    out_part: Part
    leading_shape: tuple[int, ...] | None
    token_index_T: Tensor | None
    routing: Routing | None


@dataclass
class _Notes:
    """What one micro-batch left on this rank."""

    calls: list[_Call] = field(default_factory=list)
    routers: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[int, Site] = field(default_factory=dict)


class Collector:
    """Runs forward passes of a model and returns the sums of gains per owned module and sample."""

    def __init__(self, model: ScorableModel, reducer: Reducer | None = None) -> None:
        self.model = model
        self.reducer = reducer or Reducer(model.groups)
        self.last_site: str | None = None
        self._notes: dict[int, _Notes] = {}
        self._current = 0
        self._kept = NoteStorage()
        self._remembered: tuple[Tensor, int, Tensor] | None = None
        self._first_row: dict[int, int] = {}
        self._num_rows = 0
        owned_rows: list[int] = []
        owned: list[str] = []
        is_owner = {name: self.reducer.is_owner(name) for name in {site.group for site in model.sites}}
        for site in model.sites:
            self._first_row[id(site)] = self._num_rows
            if is_owner[site.group]:
                owned_rows += range(self._num_rows, self._num_rows + len(site.projections))
                owned += [projection.fqn for projection in site.projections]
            self._num_rows += len(site.projections)
        self._owned_rows = torch.tensor(owned_rows, dtype=torch.int64)
        self.owned = tuple(owned)  # the paths whose sums step() returns

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks in place for the length of the block; they are gone afterwards, also after an error."""
        detach: list[Callable[[], None]] = []
        try:
            for site in self.model.sites:
                detach.append(site.attach(self))
            yield
        finally:
            for remove in reversed(detach):
                remove()
            self._notes.clear()
            self._remembered = None

    def step(self, micro_batches: Sequence[MicroBatch]) -> SampleTotals:
        """Run one forward and return this rank's sums, for the modules it owns. Collective over the model's ranks.

        Must run inside `attached()`. Returned sample_ids are those that occur, in ascending order.
        """
        self._notes.clear()
        self._kept.rewind()
        with torch.no_grad():
            self.model.forward(micro_batches, self._begin)
            self._remembered = None
            parts = [self._finish(index, micro_batch) for index, micro_batch in enumerate(micro_batches)]
        self._notes.clear()
        return add_totals(parts, self.owned)

    # -- Recorder ------------------------------------------------------------------------------------------------

    def sq_norm(self, z_TI: Tensor) -> Tensor:
        """Return ||z_t||^2, (T,) float32, remembered for the next site that reads the very same tensor (q, k, v)."""
        if z_TI.is_inference():  # these keep no version by which a change in place would show
            return local_sq_norm(z_TI)
        known = self._remembered
        if known is not None and known[0] is z_TI and known[1] == z_TI._version:
            return known[2]
        in_sq_T = self._kept.keep(local_sq_norm(z_TI))
        self._remembered = (z_TI, z_TI._version, in_sq_T)
        return in_sq_T

    def record(
        self,
        site: Site,
        in_sq_T: Tensor,
        out_sq_T: Sequence[Tensor],
        *,
        in_part: Part = Part.WHOLE,
        out_part: Part = Part.WHOLE,
        leading_shape: Sequence[int] | None = None,
        token_index_T: Tensor | None = None,
        routing: Routing | None = None,
    ) -> None:
        """Note one call of a site (see protocols.Recorder)."""
        self.last_site = site.projections[0].fqn
        shape = None if leading_shape is None else tuple(leading_shape)
        out_sq = [self._kept.keep(row_T) for row_T in out_sq_T]
        call = _Call(site, in_sq_T, out_sq, in_part, out_part, shape, token_index_T, routing)
        self._notes[self._current].calls.append(call)

    def record_unreadable(self, site: Site) -> None:
        """Note that a site gets no score (see protocols.Recorder)."""
        self._notes[self._current].unreadable[id(site)] = site

    def record_routing(self, router: str, map_TE: Tensor) -> None:
        """Note which experts each local token goes to."""
        self._notes[self._current].routers[router] = map_TE

    # -- after the forward ---------------------------------------------------------------------------------------

    def _begin(self, index: int) -> None:
        self._current = index
        self._notes.setdefault(index, _Notes())  # with virtual pipeline stages a micro-batch begins once per stage
        self._remembered = None

    def _finish(self, index: int, micro_batch: MicroBatch) -> SampleTotals:
        notes = self._notes.get(index, _Notes())
        self._complete(notes.calls, index)
        samples = self._samples(notes, index, micro_batch)
        table = _GainTable(samples)
        for call in notes.calls:
            numbers_T = _numbers(call, samples, micro_batch.has_features)
            sizes = {call.in_sq_T.numel(), *(out_sq_T.numel() for out_sq_T in call.out_sq)}
            if numbers_T is None or sizes != {numbers_T.numel()}:
                notes.unreadable[id(call.site)] = call.site
                continue
            for row, out_sq_T in enumerate(call.out_sq, start=self._first_row[id(call.site)]):
                table.add(row, call.in_sq_T, out_sq_T, numbers_T)
        sample_ids = samples.sample_ids.cpu().numpy()
        totals = to_totals(table.sum_up(self._num_rows)[:, self._owned_rows], self.owned, sample_ids)
        return self._without(list(notes.unreadable.values()), totals, samples.count().cpu().numpy())

    def _samples(self, notes: _Notes, index: int, micro_batch: MicroBatch) -> TokenSamples:
        layout = self.model.token_layout(micro_batch)
        if not notes.routers:
            return TokenSamples(layout)
        local_T = self.model.routed_layout(micro_batch)
        maps = list(notes.routers.values())
        routed_T, maps = self.reducer.gather_routing(local_T, maps, f"routing of micro-batch {index}")
        return TokenSamples(layout, routed_T, dict(zip(notes.routers, maps, strict=True)))

    def _complete(self, calls: Sequence[_Call], index: int) -> None:
        """Make the squared norms of all calls whole: one collective per feature group that has peers."""
        by_group: dict[str, list[_Call]] = {}
        for call in calls:
            by_group.setdefault(call.site.group, []).append(call)
        for name, members in by_group.items():
            if self.reducer.size(name) == 1:
                continue
            rows: list[tuple[Tensor, Part]] = []
            for call in members:
                rows += [(call.in_sq_T, call.in_part), *((row, call.out_part) for row in call.out_sq)]
            whole = iter(self.reducer.complete(rows, name, f"sum of squared norms of micro-batch {index}"))
            for call in members:
                call.in_sq_T, call.out_sq = next(whole), [next(whole) for _ in call.out_sq]

    def _without(self, sites: Sequence[Site], totals: SampleTotals, counts_S: np.ndarray) -> SampleTotals:
        """Return the totals with all tokens of these sites' modules skipped, and their gain NaN.

        No sum over batches or ranks loses a NaN: one such call, and a module has no score.
        """
        owned = set(self.owned) if sites else set()
        fqns = tuple(p.fqn for site in sites for p in site.projections if p.fqn in owned)
        if not fqns or not len(counts_S):
            return totals
        shape = (len(fqns), len(counts_S))
        nan, none, every = np.full(shape, np.nan), np.zeros(shape, np.int64), np.tile(counts_S, (len(fqns), 1))
        return add_totals([totals, SampleTotals(fqns, totals.sample_ids, nan, none, every)], self.owned)


class _GainTable:
    """The gains of one micro-batch's calls, added up per (row, sample) all at once."""

    def __init__(self, samples: TokenSamples) -> None:
        self._num_samples, self._device = len(samples.sample_ids), samples.sample_ids.device
        self._rows: list[int] = []
        self._in_sq: list[Tensor] = []
        self._out_sq: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def add(self, row: int, in_sq_T: Tensor, out_sq_T: Tensor, numbers_T: Tensor) -> None:
        """Put in one projection's tokens, whole squared norms, and the samples' numbers, -1 for padding."""
        self._rows.append(row)
        self._in_sq.append(in_sq_T)
        self._out_sq.append(out_sq_T)
        self._numbers.append(numbers_T)

    def sum_up(self, num_rows: int) -> Tensor:
        """Return the sums of gains, of tokens, and of skipped tokens, (3, M, S) float64, on the CPU."""
        planes = torch.zeros(3, num_rows * self._num_samples, dtype=torch.float64, device=self._device)
        if self._rows and self._num_samples:
            sample_N = torch.cat(self._numbers)
            counts = torch.tensor([numbers_T.numel() for numbers_T in self._numbers], device=self._device)
            row_N = torch.tensor(self._rows, device=self._device).repeat_interleave(counts)
            index_N = row_N * self._num_samples + sample_N.clamp_min(0)
            in_sq_N = torch.cat(self._in_sq)
            gain_N = gains(in_sq_N, torch.cat(self._out_sq))
            real_N = sample_N >= 0
            valid_N = real_N & gain_N.isfinite() & in_sq_N.isfinite()
            parts = (gain_N.where(valid_N, gain_N.new_zeros(())), valid_N, real_N & ~valid_N)
            for plane, values_N in zip(planes, parts, strict=True):
                plane.index_add_(0, index_N, values_N.double())
        return planes.view(3, num_rows, self._num_samples).cpu()


def _numbers(call: _Call, samples: TokenSamples, has_features: bool) -> Tensor | None:
    """Return the sample number of each token of a call, (T,), or None where they are not the batch's tokens.

    has_features: whether there is more than text for towers and projectors to see.
    """
    if has_features and call.site.projections[0].part != "language":
        return samples.of_features(call.leading_shape or (call.in_sq_T.numel(),))
    if call.routing is not None:
        return samples.of_routed(call.routing)
    if call.token_index_T is not None:
        all_T = samples.of_all()
        return None if all_T is None else all_T[call.token_index_T]
    if Part.TOKENS in (call.in_part, call.out_part):
        return samples.of_all()
    return samples.of_shape(call.leading_shape or (call.in_sq_T.numel(),))
