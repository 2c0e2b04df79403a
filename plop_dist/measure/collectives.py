"""Every collective of scoring, in one place: sums over feature shards, routing maps, and the merge over all ranks.

Each call names itself, so that a timeout or a lost peer becomes a CollectiveError that says which rank was doing what.
"""

# T tokens, E experts, M modules, S samples, R ranks

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.errors import CollectiveError, LayoutError, PlopError, WorkerError, first_line
from plop_dist.measure.protocols import Groups, Part, Site
from plop_dist.measure.sums import spread, to_totals
from plop_dist.values.names import natural_key
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import Projection

_T = TypeVar("_T")


@dataclass
class Traffic:
    """How much was communicated by this rank: number of collectives and payload bytes."""

    num_collectives: int = 0
    num_bytes: int = 0


class Reducer:
    """The collectives of one model's ranks. Without torch.distributed every method returns its input."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.traffic = Traffic()

    def is_owner(self, name: str) -> bool:
        """Tell whether this rank speaks for the ranks that share its shards on feature group `name`."""
        group = self.groups.features.get(name)
        return group is None or dist.get_rank(group) == 0

    def size(self, name: str) -> int:
        """Return the number of ranks of feature group `name`."""
        group = self.groups.features.get(name)
        return 1 if group is None else dist.get_world_size(group)

    def sum_flat(self, tensors: Sequence[Tensor], group: Any, what: str) -> list[Tensor]:
        """Return the element-wise sums of the tensors over `group`, in one collective. Collective over `group`.

        tensors: any shapes, one dtype; every rank passes the same shapes in the same order. group: None is this rank
        alone.
        """
        if not tensors or not _has_peers(group):
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._run(lambda: dist.all_reduce(flat, group=group), flat, group, what)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def complete(self, rows: Sequence[tuple[Tensor, Part]], name: str, what: str) -> list[Tensor]:
        """Return whole per-token squared norms from this rank's parts, in one collective over feature group `name`.

        rows: ((T,) float32, part) each. A PARTIAL row is summed. A TOKENS row (T_local) is put at this rank's place of
        a row of zeros before the sum, which gathers it: (T_local * ranks,). A WHOLE row is not sent. The same tensor
        listed twice is sent once.
        """
        group = self.groups.features.get(name)
        size = self.size(name)
        if size == 1:
            return [row for row, _ in rows]
        rank = dist.get_rank(group)
        sent: dict[int, Tensor] = {}
        for row, part in rows:
            if part is Part.PARTIAL:
                sent[id(row)] = row
            elif part is Part.TOKENS and id(row) not in sent:
                slots = row.new_zeros(size, row.numel())
                slots[rank] = row
                sent[id(row)] = slots.view(-1)
        summed = dict(zip(sent, self.sum_flat(list(sent.values()), group, what), strict=True))
        return [row if part is Part.WHOLE else summed[id(row)] for row, part in rows]

    def gather_routing(self, ids_T: Tensor, maps: Sequence[Tensor], what: str) -> tuple[Tensor, list[Tensor]]:
        """Return all ranks' sample ids and routing maps, in rank order. Two collectives over the routing group.

        ids_T: (T_local,) int64, this rank's tokens; maps: (T_local, E) bool per router; T_local may differ between
        ranks. Returns (T,) and (T, E) per router, T the sum of T_local.
        """
        group = self.groups.routing
        if not _has_peers(group):
            return ids_T, list(maps)
        sizes_R = ids_T.new_empty(dist.get_world_size(group))
        own_size = ids_T.new_tensor([ids_T.numel()])
        self._run(lambda: dist.all_gather_into_tensor(sizes_R, own_size, group=group), sizes_R, group, what)
        sizes = sizes_R.tolist()
        table_TC = torch.cat([ids_T[:, None], *[map_TE.to(ids_T.dtype) for map_TE in maps]], dim=1)
        padded_TC = table_TC.new_zeros(max(sizes), table_TC.shape[1])
        padded_TC[: len(table_TC)] = table_TC
        gathered_TC = padded_TC.new_empty(len(sizes) * max(sizes), padded_TC.shape[1])
        self._run(lambda: dist.all_gather_into_tensor(gathered_TC, padded_TC, group=group), gathered_TC, group, what)
        kept_TC = torch.cat([part[:size] for part, size in zip(gathered_TC.split(max(sizes)), sizes, strict=True)])
        columns = kept_TC.split([1, *[map_TE.shape[1] for map_TE in maps]], dim=1)
        return columns[0].flatten(), [column.bool() for column in columns[1:]]

    def sum_world(self, tensor: Tensor, what: str) -> Tensor:
        """Return the sum of a CPU tensor over all ranks, on the CPU. Collective over the world."""
        if self.groups.alone or not _is_one_of_many():
            return tensor
        device = _device_of(None)
        moved = tensor.to(device)
        self._run(lambda: dist.all_reduce(moved), moved, None, what)
        return moved.cpu()

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """Return every rank's picklable value. Collective over the world."""
        if self.groups.alone or not _is_one_of_many():
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        self._run(lambda: dist.all_gather_object(gathered, value), None, None, what)
        return gathered

    def gather_or_raise(self, value: Any, error: Exception | None, what: str) -> list[Any]:
        """Return every rank's picklable value, or raise on every rank what went wrong on any.

        Collective over the world. error: this rank's own, as `attempt` returns it. Others hear of it by class and text,
        because a host's own exceptions need not survive pickling: as a WorkerError where it is none of ours.
        """
        told = (type(error), str(error))
        if not isinstance(error, PlopError):
            told = (WorkerError, f"{what} failed: {type(error).__name__}: {error}")
        gathered = self.gather_objects((None if error is None else told, value), f"agreement after {what}")
        if isinstance(error, PlopError):
            raise error
        for rank, (kind_and_text, _) in enumerate(gathered):
            if kind_and_text is not None:
                kind, text = kind_and_text
                raise kind(f"rank {rank}: {text}") from error
        return [value for _, value in gathered]

    def merge_projections(self, sites: Sequence[Site]) -> tuple[Projection, ...]:
        """Return the projections of all ranks' sites in natural order, each once. Collective over the world.

        Of the ranks that hold the same modules one alone sends them. Raises LayoutError when two pipeline stages claim
        the same path.
        """
        is_sender = {
            name: self.groups.copies.get(name, (0, 1))[0] == 0 and self.is_owner(name)
            for name in {site.group for site in sites}
        }
        own = tuple(projection for site in sites if is_sender[site.group] for projection in site.projections)
        found: dict[str, tuple[str, Projection]] = {}
        for stage, projections in self.gather_objects((self.groups.stage, own), "merge of module names"):
            for projection in projections:
                known = found.setdefault(projection.fqn, (stage, projection))
                if known[0] != stage:
                    raise LayoutError(
                        f"module '{projection.fqn}' is on pipeline stages {known[0]} and {stage}; each module must be "
                        "on one stage only."
                    )
        return tuple(found[fqn][1] for fqn in sorted(found, key=natural_key))

    def merge_unknown(self, own: Sequence[Projection]) -> tuple[Projection, ...]:
        """Return what any rank has found beside its sites, each path once, in natural order. Collective."""
        every = self.gather_objects(tuple(own), "merge of weights without a site")
        found = {projection.fqn: projection for projections in every for projection in projections}
        return tuple(found[fqn] for fqn in sorted(found, key=natural_key))

    def merge_totals(self, owned: SampleTotals, fqns: Sequence[str], sample_ids: np.ndarray) -> SampleTotals:
        """Return the totals of all modules and these samples from what each rank owns. Collective over the world.

        owned: this rank's sums; ranks must not hold the same (token, module) twice. sample_ids: ascending, the same on
        every rank, with all that any rank owns among them.
        """
        planes = self.sum_world(spread([owned], fqns, sample_ids), "merge of the per-sample sums")
        return to_totals(planes, fqns, sample_ids)

    def _run(self, collective: Any, payload: Tensor | None, group: Any, what: str) -> None:
        try:
            collective()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(group) if group is not None else "all"
            raise CollectiveError(
                f"rank {dist.get_rank()}: {what} over ranks {ranks} failed: {first_line(error)}; another rank "
                "died, raised or did not answer within the group's timeout (cluster.timeout_s; in a job of your own, "
                "that of init_process_group)."
            ) from error
        self.traffic.num_collectives += 1
        self.traffic.num_bytes += 0 if payload is None else payload.numel() * payload.element_size()


def attempt(do: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """Return (result, None), or (None, what it raised): peers must hear of an error before they wait for this rank."""
    try:
        return do(), None
    except Exception as error:
        return None, error


def _has_peers(group: Any) -> bool:
    # torch reads None as the world; here, as in Groups, it means that this rank is alone on the axis.
    return group is not None and dist.get_world_size(group) > 1


def _is_one_of_many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device_of(group: Any) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )
