"""Which gains each module shows on each sample: hooks note local squared norms, one reduction completes them.

During a forward pass the hooks only append to lists. After it, one stacked collective per feature group and
micro-batch makes the norms whole, and the gains are added up per (module, sample) in float64.
"""

# T tokens, N all tokens of all modules, M modules, S samples, E experts

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from plop_dist.measure.collectives import Reducer
from plop_dist.measure.norms import gains, local_sq_norm
from plop_dist.measure.note_storage import NoteStorage
from plop_dist.measure.protocols import MicroBatch, Part, Routing, ScorableModel, Site
from plop_dist.values.scores import SampleTotals


@dataclass(frozen=True)
class _Call:
    """One call of one site: its squared norms, local until `in_part` and `out_part` say WHOLE."""

    site: Site
    in_sq_T: Tensor
    out_sq: tuple[Tensor, ...]
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
        self.last_site = "no module yet"
        self._notes: dict[int, _Notes] = {}
        self._current = 0
        self._kept = NoteStorage()
        self._remembered: tuple[Tensor, int, Tensor] | None = None
        self._row: dict[int, int] = {}
        for site in model.sites:
            self._row[id(site)] = sum(len(known.projections) for known in model.sites[: len(self._row)])
        self._owned = [
            (row, projection.fqn)
            for site in model.sites
            for row, projection in enumerate(site.projections, start=self._row[id(site)])
            if self.reducer.is_owner(site.group)
        ]
        self.owned = tuple(fqn for _, fqn in self._owned)  # the paths whose sums step() returns
        self._num_rows = sum(len(site.projections) for site in model.sites)

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
        out_sq = tuple(self._kept.keep(row_T) for row_T in out_sq_T)
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
        calls = self._complete(notes.calls, index)
        layout = self.model.token_layout(micro_batch)
        ids = _TokenIds(layout)
        if notes.routers:
            maps = list(notes.routers.values())
            local_T = self.model.routed_layout(micro_batch)
            gathered = self.reducer.gather_routing(local_T, maps, f"routing of micro-batch {index}")
            ids.add_routing(notes.routers, *gathered)
        in_sq, out_sq, rows, columns = [], [], [], []
        for call in calls:
            ids_T = ids.of(call)
            sizes = {call.in_sq_T.numel(), *(out_sq_T.numel() for out_sq_T in call.out_sq)}
            if ids_T is None or sizes != {ids_T.numel()}:
                notes.unreadable[id(call.site)] = call.site
                continue
            for offset, out_sq_T in enumerate(call.out_sq):
                in_sq.append(call.in_sq_T)
                out_sq.append(out_sq_T)
                rows.append(self._row[id(call.site)] + offset)
                columns.append(ids_T)
        totals = self._accumulate(in_sq, out_sq, rows, columns)
        return self._without(list(notes.unreadable.values()), totals, layout)

    def _without(self, sites: Sequence[Site], totals: SampleTotals, layout: Tensor) -> SampleTotals:
        """Return the totals with all tokens of these sites' modules skipped, and their gain NaN.

        No sum over batches or ranks loses a NaN: one such call, and a module has no score.
        """
        fqns = {projection.fqn for site in sites for projection in site.projections}
        is_out = np.array([fqn in fqns for fqn in self.owned], dtype=bool)
        samples_S, counts_S = layout[layout >= 0].unique(return_counts=True)
        if not is_out.any() or not len(samples_S):
            return totals
        shape = (len(self.owned), len(samples_S))
        gain_total, num_tokens, num_skipped = np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        gain_total[is_out], num_skipped[is_out] = np.nan, counts_S.cpu().numpy()
        marks = SampleTotals(self.owned, samples_S.cpu().numpy(), gain_total, num_tokens, num_skipped)
        return add_totals([totals, marks], self.owned)

    def _complete(self, calls: Sequence[_Call], index: int) -> list[_Call]:
        done: dict[int, _Call] = {}
        for name in dict.fromkeys(call.site.group for call in calls):
            members = [number for number, call in enumerate(calls) if call.site.group == name]
            rows: list[tuple[Tensor, Part]] = []
            for number in members:
                call = calls[number]
                rows += [(call.in_sq_T, call.in_part), *[(row, call.out_part) for row in call.out_sq]]
            whole = iter(self.reducer.complete(rows, name, f"sum of squared norms of micro-batch {index}"))
            for number in members:
                call = calls[number]
                in_sq_T = next(whole)
                out_sq = tuple(next(whole) for _ in call.out_sq)
                done[number] = replace(call, in_sq_T=in_sq_T, out_sq=out_sq)
        return [done[number] for number in sorted(done)]

    def _accumulate(
        self, in_sq: list[Tensor], out_sq: list[Tensor], rows: list[int], columns: list[Tensor]
    ) -> SampleTotals:
        fqns = self.owned
        if not rows:
            return _empty(fqns)
        distinct = {id(ids_T): ids_T for ids_T in columns}
        samples_S = torch.unique(torch.cat(list(distinct.values())))
        samples_S = samples_S[samples_S >= 0]
        if not len(samples_S):
            return _empty(fqns)
        local = {key: torch.searchsorted(samples_S, ids_T.clamp_min(0)) for key, ids_T in distinct.items()}
        real_N = torch.cat(columns) >= 0
        counts = torch.tensor([ids_T.numel() for ids_T in columns], device=samples_S.device)
        rows_N = torch.tensor(rows, device=samples_S.device).repeat_interleave(counts)
        index_N = rows_N * len(samples_S) + torch.cat([local[id(ids_T)] for ids_T in columns])
        in_sq_N = torch.cat(in_sq)
        gain_N = gains(in_sq_N, torch.cat(out_sq))
        valid_N = real_N & gain_N.isfinite() & in_sq_N.isfinite()
        shape = (self._num_rows, len(samples_S))

        def totals(values_N: Tensor) -> Tensor:
            flat = values_N.new_zeros(shape[0] * shape[1], dtype=torch.float64)
            return flat.index_add_(0, index_N, values_N.double()).view(shape)

        planes = torch.stack(
            [totals(gain_N.where(valid_N, gain_N.new_zeros(()))), totals(valid_N), totals(real_N & ~valid_N)]
        )
        gain_total, num_tokens, num_skipped = planes[:, [row for row, _ in self._owned]].cpu().numpy()
        return SampleTotals(
            fqns, samples_S.cpu().numpy(), gain_total, num_tokens.astype("int64"), num_skipped.astype("int64")
        )


class _TokenIds:
    """The sample id of every token of a call, whatever shape the module saw and whoever routed the tokens to it."""

    def __init__(self, layout: Tensor) -> None:
        self._layout = layout
        self._flat = layout.reshape(-1)
        self._by_shape: dict[tuple[int, ...], Tensor | None] = {}
        self._routing: dict[str, tuple[Tensor, Tensor]] = {}

    def add_routing(self, routers: Iterable[str], ids_T: Tensor, maps: Sequence[Tensor]) -> None:
        """Keep the sample ids and, per router, the maps of all source ranks' tokens, one after the other."""
        self._routing = {router: (ids_T, map_TE) for router, map_TE in zip(routers, maps, strict=True)}

    def of(self, call: _Call) -> Tensor | None:
        """Return (T,) int64, -1 for padding, or None for activations that are not the batch's tokens."""
        if call.routing is not None:
            ids_T, map_TE = self._routing[call.routing.router]
            return ids_T[map_TE[:, call.routing.expert]]
        if call.token_index_T is not None:
            return self._flat[call.token_index_T]
        shape = call.leading_shape or (call.in_sq_T.numel(),)
        if call.in_part is Part.TOKENS or call.out_part is Part.TOKENS:
            return self._flat
        if shape not in self._by_shape:
            self._by_shape[shape] = self._spread(shape)
        return self._by_shape[shape]

    def _spread(self, shape: tuple[int, ...]) -> Tensor | None:
        first, second = self._layout.shape
        if shape in ((first, second), (first * second,)):
            return self._flat
        if len(shape) == 3 and shape[:2] == (first, second):  # one vector per head: (b, s, heads)
            return self._layout[:, :, None].expand(shape).reshape(-1)
        if len(shape) == 3 and (shape[0], shape[2]) == (first, second):  # (b, heads, s)
            return self._layout[:, None, :].expand(shape).reshape(-1)
        if len(shape) == 2 and shape[0] == first * second:  # (b * s, heads)
            return self._flat[:, None].expand(shape).reshape(-1)
        return None  # it pools, cuts or lengthens the sequence


def _empty(fqns: tuple[str, ...]) -> SampleTotals:
    none = torch.zeros(len(fqns), 0, dtype=torch.int64).numpy()
    return SampleTotals(fqns, torch.zeros(0, dtype=torch.int64).numpy(), none.astype("float64"), none, none)


def add_totals(parts: Sequence[SampleTotals], fqns: Sequence[str]) -> SampleTotals:
    """Return the sum of totals over these modules; samples are united, and without parts there are none."""
    if not parts:
        return _empty(tuple(fqns))
    if len(parts) == 1:
        return parts[0]
    samples = sorted({int(sample) for part in parts for sample in part.sample_ids})
    column = {sample: index for index, sample in enumerate(samples)}
    planes = torch.zeros(3, len(fqns), len(samples), dtype=torch.float64)
    for part in parts:
        columns = torch.tensor([column[int(sample)] for sample in part.sample_ids], dtype=torch.int64)
        for plane, array in enumerate((part.gain_total, part.num_tokens, part.num_skipped)):
            planes[plane].index_add_(1, columns, torch.from_numpy(array).double())
    gain_total, num_tokens, num_skipped = planes.numpy()
    return SampleTotals(
        tuple(fqns),
        torch.tensor(samples, dtype=torch.int64).numpy(),
        gain_total,
        num_tokens.astype("int64"),
        num_skipped.astype("int64"),
    )
