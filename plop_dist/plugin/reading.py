"""A host's batches as this rank reads them: checked, on the CPU, every key of theirs accounted for."""

# b rows, s tokens of the longest

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plop_dist.errors import DataError
from plop_dist.measure.protocols import MicroBatch
from plop_dist.plugin.batch_keys import Takes, further_inputs, packed_positions, refuse_unmarked_padding

_MANY = 2000  # batches, after which an iterator without an end is likelier than so much data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Local:
    """One rank's batches before anyone else's are known.

    ids: the host's sample ids, None where rows are samples. num_samples: without ids, the rows with tokens of each.
    """

    micro_batches: list[MicroBatch]
    ids: list[int] | None
    num_samples: list[int]


@dataclass(frozen=True)
class Reader:
    """Reads batches for one model.

    takes: whether its forward takes a key. vocab_size: the rows of its embedding, pad_id: its padding, where known.
    num_samples: reading ends with the batch that makes it as many; None reads to the end.
    """

    takes: Takes
    vocab_size: int | None = None
    pad_id: int | None = None
    num_samples: int | None = None

    def read(self, batches: Iterable[Mapping[str, Any]]) -> Local:
        """Return this rank's batches. Raises DataError naming the batch and the key."""
        return read_ahead(batches, self._micro_batch, self.num_samples)

    def _micro_batch(self, batch: Mapping[str, Any], where: str) -> tuple[MicroBatch, bool]:
        rotary = _positions_of_axes(batch)
        input_ids, given = token_tensors(batch if rotary is None else {**batch, "position_ids": None}, where)
        packed = packed_positions(batch, input_ids, where)
        if packed is not None and not torch.equal(given.setdefault("position_ids", packed), packed):
            raise DataError(f"{where}: position_ids do not begin again where cu_seq_lens_q says that samples do.")
        if packed is None:
            refuse_unmarked_padding(batch, input_ids, self.pad_id, where)
        mask = given.get("attention_mask", torch.ones_like(input_ids))
        is_real = mask != 0
        is_token = (input_ids >= 0) & (input_ids < (self.vocab_size or input_ids.max() + 1))
        foreign = input_ids[is_real & ~is_token]
        if foreign.numel():
            of_model = f" (the model has {self.vocab_size})" if self.vocab_size else ""
            raise DataError(
                f"{where}['input_ids'] holds {int(foreign[0])}, which is no token{of_model}; leave such places out of "
                "attention_mask, or check that the tokenizer is the model's."
            )
        input_ids = input_ids.where(is_token, 0)  # labels' -100 in padding, which is embedded like the rest
        extra = further_inputs(batch, where, self.takes)
        if rotary is not None:
            extra["position_ids"] = rotary
        elif extra and "position_ids" in given:
            extra["position_ids"] = given["position_ids"]
        position_ids = given.get("position_ids", (is_real.long().cumsum(dim=1) - 1).clamp_min(0))
        has_ids = "sample_ids" in given
        # A row of padding is no sample.
        rows = (is_real.any(dim=1).long().cumsum(dim=0) - 1)[:, None].expand_as(input_ids)
        sample_ids = (given["sample_ids"].clamp_min(-1) if has_ids else rows).where(is_real, -1)
        return MicroBatch(input_ids, mask, sample_ids, position_ids, extra), has_ids


def read_ahead(
    batches: Iterable[Any], read: Callable[[Any, str], tuple[MicroBatch, bool]], num_samples: int | None
) -> Local:
    """Return all batches, or as many as have num_samples, read one by one: read(batch, where), whether it has ids.

    Raises DataError.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | bytes | Tensor):
        raise DataError(
            f"batches is a {type(batches).__name__}, expected an iterable of batches, such as dictionaries with "
            "input_ids; put one batch alone into a list."
        )
    micro_batches, counts, has_ids = [], [], set()
    ids: set[int] = set()
    for number, batch in enumerate(batches):
        micro_batch, given = read(batch, f"batches[{number}]")
        micro_batches.append(micro_batch)
        has_ids.add(given)
        if given:
            ids |= {int(one) for one in micro_batch.sample_ids.unique()} - {-1}
        counts.append(0 if given else int(micro_batch.sample_ids.max()) + 1)
        if num_samples is not None and len(ids) + sum(counts) >= num_samples:
            break
        if number + 1 == _MANY and num_samples is None and not isinstance(batches, Sized):
            logger.warning("%d batches read and no end; score(..., num_samples=N) ends an endless iterator.", _MANY)
    if len(has_ids) > 1:
        raise DataError("some batches have sample_ids and others have not; give them in every batch or in none.")
    return Local(micro_batches, sorted(ids) if has_ids == {True} else None, counts)


def token_tensors(batch: Mapping[str, Any], where: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return input_ids and what else there is of the keys with one number per token: each (b, s), int64."""
    if not isinstance(batch, Mapping):
        raise DataError(f"{where} is a {type(batch).__name__}, expected a dictionary with input_ids.")
    if batch.get("input_ids") is None:
        raise DataError(
            f"{where} has no input_ids (its keys: {', '.join(map(str, batch)) or 'none'}); a model that reads none is "
            "scored by score(..., forward=), your own function of (model, batch)."
        )
    input_ids = _integers(batch, "input_ids", where)
    if input_ids.dim() != 2 or not input_ids.numel():
        raise DataError(f"{where}['input_ids'] has shape {tuple(input_ids.shape)}, expected (batch, sequence).")
    given = {name: _integers(batch, name, where) for name in ("attention_mask", "position_ids", "sample_ids")
             if batch.get(name) is not None}  # fmt: skip
    if "position_ids" in given and given["position_ids"].shape == (1, input_ids.shape[1]):
        given["position_ids"] = given["position_ids"].expand_as(input_ids)
    if "sample_ids" in given and given["sample_ids"].shape == (len(input_ids),):
        given["sample_ids"] = given["sample_ids"][:, None].expand_as(input_ids)
    for name, tensor in given.items():
        if tensor.shape != input_ids.shape:
            raise DataError(
                f"{where}['{name}'] has shape {tuple(tensor.shape)}, expected {tuple(input_ids.shape)} as input_ids."
            )
    return input_ids, given


def _positions_of_axes(batch: Any) -> Tensor | None:
    """Return position_ids of shape (axes, b, s), by which models of images tell time, height and width apart."""
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    return positions.detach().cpu() if isinstance(positions, Tensor) and positions.dim() == 3 else None


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
