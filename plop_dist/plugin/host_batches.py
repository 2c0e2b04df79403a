"""What every rank has read, made one: samples numbered over all replicas, and as many steps on every rank."""

# S samples

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from plop_dist.errors import DataError
from plop_dist.measure.collectives import Reducer, attempt
from plop_dist.measure.protocols import Groups, MicroBatch
from plop_dist.plugin.reading import Local


@dataclass(frozen=True)
class HostBatches:
    """What this rank runs over. steps: as many on every rank; sample_ids: (S,) int64, the host's own numbers."""

    steps: list[list[MicroBatch]]
    sample_ids: np.ndarray
    samples_after: list[int]


def share(read: Callable[[], Local], groups: Groups, per_step: int, reducer: Reducer) -> HostBatches:
    """Return this rank's steps once all ranks' batches are known. Collective over the world.

    read: reads this rank's batches. per_step: micro-batches that one forward takes. Samples without ids are numbered
    in replica order. Where forward is collective over replicas, a rank with fewer batches gets fillers that count for
    nothing. Raises on every rank what reading raised on any, and DataError when there is nothing to score or the ranks
    of one replica have different batches.
    """
    local, error = attempt(read)
    facts = None if local is None else (len(local.micro_batches), local.ids, local.num_samples, _digest(local))
    everyone = reducer.gather_or_raise((groups.replica, facts), error, "reading batches")
    assert local is not None
    replicas = _by_replica(everyone)
    kinds = {ids is not None for count, ids, _, _ in replicas.values() if count}
    if not kinds:
        raise DataError("batches is empty on every rank; pass dictionaries with input_ids of shape (batch, sequence).")
    if len(kinds) > 1:
        raise DataError("batches have sample_ids on some ranks and not on others; give them on every rank or on none.")
    micro_batches, sample_ids = _numbered(local, groups.replica, replicas, has_ids=kinds == {True})
    if not len(sample_ids):
        raise DataError("batches hold nothing but padding; check attention_mask and sample_ids.")
    num_steps = -(-max(count for count, *_ in replicas.values()) // per_step)
    if groups.uniform_steps:
        micro_batches += [_filler(micro_batches, reducer)] * (num_steps * per_step - len(micro_batches))
    steps = [micro_batches[step * per_step : (step + 1) * per_step] for step in range(num_steps)]
    done = [len(sample_ids) * (step + 1) // num_steps for step in range(num_steps)]
    return HostBatches(steps, sample_ids, done)


def _by_replica(everyone: Sequence[Any]) -> dict[int, Any]:
    """Return the facts of each replica. Raises DataError when its ranks disagree."""
    first: dict[int, tuple[int, Any]] = {}
    for rank, (replica, facts) in enumerate(everyone):
        other, known = first.setdefault(replica, (rank, facts))
        if known != facts:
            raise DataError(
                f"ranks {other} and {rank} belong to one model replica but have different batches ({known[0]} and "
                f"{facts[0]} of them); pass every tensor- and pipeline-parallel rank the same ones."
            )
    return {replica: facts for replica, (_, facts) in sorted(first.items())}


def _digest(local: Local) -> int:
    return hash(tuple((*micro.input_ids.shape, int(micro.input_ids.sum())) for micro in local.micro_batches))


def _numbered(
    local: Local, replica: int, replicas: Mapping[int, Any], *, has_ids: bool
) -> tuple[list[MicroBatch], np.ndarray]:
    """Return the micro-batches with sample ids 0..S-1 over all replicas, and the host's numbers of those."""
    if has_ids:
        known = sorted({one for _, ids, _, _ in replicas.values() for one in ids or ()})
        table = torch.tensor(known, dtype=torch.int64)
        return [
            replace(micro, sample_ids=torch.searchsorted(table, micro.sample_ids).where(micro.sample_ids >= 0, -1))
            for micro in local.micro_batches
        ], table.numpy()
    start = sum(sum(counts) for other, (_, _, counts, _) in replicas.items() if other < replica)
    numbered = []
    for micro, count in zip(local.micro_batches, local.num_samples, strict=True):
        numbered.append(replace(micro, sample_ids=micro.sample_ids.add(start).where(micro.sample_ids >= 0, -1)))
        start += count
    return numbered, np.arange(sum(sum(counts) for _, _, counts, _ in replicas.values()))


def _filler(micro_batches: Sequence[MicroBatch], reducer: Reducer) -> MicroBatch:
    """Return a little of a batch, of a peer's where this rank has none, that counts for nothing. Collective."""
    own = next((_uncounted(micro) for micro in micro_batches if micro.attention_mask.any()), None)
    every = reducer.gather_objects(own, "example for ranks without batches")
    return own or next(one for one in every if one is not None)


def _uncounted(micro: MicroBatch) -> MicroBatch:
    """Return one real row without its sample; the whole batch where it has keys that nobody can cut."""
    if micro.extra:
        return replace(micro, sample_ids=torch.full_like(micro.sample_ids, -1))
    row = int(micro.attention_mask.any(dim=1).long().argmax())
    one = {
        name: getattr(micro, name)[row : row + 1].clone() for name in ("input_ids", "attention_mask", "position_ids")
    }
    return MicroBatch(**one, sample_ids=torch.full_like(one["input_ids"], -1))
