"""A host's batches as micro-batches: samples numbered over all replicas, and as many steps on every rank."""

# b rows, s tokens of the longest, S samples

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plop_dist.errors import DataError
from plop_dist.measure.collectives import Reducer, attempt
from plop_dist.measure.protocols import Groups, MicroBatch


@dataclass(frozen=True)
class HostBatches:
    """What this rank runs over. steps: as many on every rank; sample_ids: (S,) int64, the host's own numbers."""

    steps: list[list[MicroBatch]]
    sample_ids: np.ndarray
    samples_after: list[int]


@dataclass(frozen=True)
class _Local:
    """One rank's batches before anyone else's are known. ids: the host's sample ids, None where rows are samples."""

    micro_batches: list[MicroBatch]
    ids: list[int] | None
    num_samples: list[int]  # without ids: rows with tokens, per micro-batch


def read_local(batches: Iterable[Mapping[str, Any]], vocab_size: int | None = None) -> _Local:
    """Return this rank's batches, checked, on the CPU. Raises DataError naming the batch and the key.

    vocab_size: of the model's embedding, where it is known.
    """
    if not isinstance(batches, Iterable):
        raise DataError(f"batches is a {type(batches).__name__}, expected an iterable of dictionaries with input_ids.")
    micro_batches, counts, has_ids = [], [], set()
    for number, batch in enumerate(batches):
        micro_batch, given = _micro_batch(batch, f"batches[{number}]", vocab_size)
        micro_batches.append(micro_batch)
        has_ids.add(given)
        counts.append(0 if given else int(micro_batch.sample_ids.max()) + 1)
    if len(has_ids) > 1:
        raise DataError("some batches have sample_ids and others have not; give them in every batch or in none.")
    ids = None
    if has_ids == {True}:
        found = {int(one) for micro_batch in micro_batches for one in micro_batch.sample_ids.unique()}
        ids = sorted(found - {-1})
    return _Local(micro_batches, ids, counts)


def share(read: Callable[[], _Local], groups: Groups, per_step: int, reducer: Reducer) -> HostBatches:
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


def _micro_batch(batch: Mapping[str, Any], where: str, vocab_size: int | None) -> tuple[MicroBatch, bool]:
    if not isinstance(batch, Mapping):
        raise DataError(f"{where} is a {type(batch).__name__}, expected a dictionary with input_ids.")
    if batch.get("input_ids") is None:
        raise DataError(f"{where} has no input_ids (its keys: {', '.join(map(str, batch)) or 'none'}).")
    input_ids = _integers(batch, "input_ids", where)
    if input_ids.dim() != 2 or not input_ids.numel():
        raise DataError(f"{where}['input_ids'] has shape {tuple(input_ids.shape)}, expected (batch, sequence).")
    given = {name: _integers(batch, name, where) for name in ("attention_mask", "position_ids", "sample_ids")
             if batch.get(name) is not None}  # fmt: skip
    num_rows = len(input_ids)
    if "position_ids" in given and given["position_ids"].shape == (1, input_ids.shape[1]):
        given["position_ids"] = given["position_ids"].expand_as(input_ids)
    if "sample_ids" in given and given["sample_ids"].shape == (num_rows,):
        given["sample_ids"] = given["sample_ids"][:, None].expand_as(input_ids)
    for name, tensor in given.items():
        if tensor.shape != input_ids.shape:
            raise DataError(
                f"{where}['{name}'] has shape {tuple(tensor.shape)}, expected {tuple(input_ids.shape)} as input_ids."
            )
    mask = given.get("attention_mask", torch.ones_like(input_ids))
    is_real = mask != 0
    is_token = (input_ids >= 0) & (input_ids < (vocab_size or input_ids.max() + 1))
    foreign = input_ids[is_real & ~is_token]
    if foreign.numel():
        of_model = f" (the model has {vocab_size})" if vocab_size else ""
        raise DataError(
            f"{where}['input_ids'] holds {int(foreign[0])}, which is no token{of_model}; leave such places out of "
            "attention_mask, or check that the tokenizer is the model's."
        )
    input_ids = input_ids.where(is_token, 0)  # labels' -100 in padding, which is embedded like the rest
    position_ids = given.get("position_ids", (is_real.long().cumsum(dim=1) - 1).clamp_min(0))
    has_ids = "sample_ids" in given
    # A row of padding is no sample.
    rows = (is_real.any(dim=1).long().cumsum(dim=0) - 1)[:, None].expand_as(input_ids)
    sample_ids = given["sample_ids"].clamp_min(-1) if has_ids else rows
    return MicroBatch(input_ids, mask, sample_ids.where(is_real, -1), position_ids), has_ids


def _integers(batch: Mapping[str, Any], name: str, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(batch[name]).detach().to("cpu", copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}['{name}'] is not a tensor of integers ({error}).") from None
    # A mask of floats that are neither 0 nor 1 is one to be added to logits, where 0 means a real token.
    is_mask = name == "attention_mask" and bool(((tensor == 0) | (tensor == 1)).all())
    if not is_mask and (tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex()):
        raise DataError(f"{where}['{name}'] is {tensor.dtype}, expected integers.")
    return tensor.long()


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


def _digest(local: _Local) -> int:
    return hash(tuple((*micro.input_ids.shape, int(micro.input_ids.sum())) for micro in local.micro_batches))


def _numbered(
    local: _Local, replica: int, replicas: Mapping[int, Any], *, has_ids: bool
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
    """Return one real row of a batch, of a peer's where this rank has none, that counts for nothing. Collective."""
    own = next((_one_row(micro) for micro in micro_batches if micro.attention_mask.any()), None)
    every = reducer.gather_objects(own, "example for ranks without batches")
    return own or next(one for one in every if one is not None)


def _one_row(micro: MicroBatch) -> MicroBatch:
    row = int(micro.attention_mask.any(dim=1).long().argmax())
    one = {
        name: getattr(micro, name)[row : row + 1].clone() for name in ("input_ids", "attention_mask", "position_ids")
    }
    return MicroBatch(**one, sample_ids=torch.full_like(one["input_ids"], -1))
