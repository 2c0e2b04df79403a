"""A model that the host's own function runs: any module with linears, whatever its batches hold."""

# b rows, s positions

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plop_dist.errors import DataError
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.plugin.reading import Local, read_ahead, token_tensors
from plop_dist.values.scores import Projection

_BATCH = "batch"  # the host's own, as a further input of the micro-batch

Forward = Callable[[Any, Any], Any]
Mask = Callable[[Any], Any]


class OwnForward:
    """ScorableModel that calls forward(host, batch) instead of the model's own.

    model: the host's model as the collector sees it otherwise; host: what the host gave to score().
    """

    micro_batches_per_step = 1

    def __init__(self, model: ScorableModel, host: Any, forward: Forward) -> None:
        self.sites, self.groups, self.device = model.sites, model.groups, model.device
        self._model, self._host, self._forward = model, host, forward
        self._reads_pairs = getattr(model, "reads_pairs", False)

    def check(self, micro_batch: MicroBatch) -> None:
        """Take every micro-batch: what a row sees is for the host's function to say.

        Raises DataError for padding in an encoder-decoder model's: which of its two texts is padded there is not told.
        """
        if self._reads_pairs and (bool((micro_batch.attention_mask == 0).any()) or _pads(micro_batch.extra[_BATCH])):
            raise DataError(
                "a batch has padding, and the model has an encoder and a decoder, whose tokens no mask tells from the "
                "padding of the other's text; pass samples without padding, one per batch where their lengths differ."
            )

    def takes(self, key: str) -> bool | None:
        """Take every key: the host's function has the whole batch."""
        return True

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids: (b, s), or (b,) where every position counts, as it does where two texts are read."""
        sample_ids = micro_batch.sample_ids.to(self.device)
        return sample_ids.amax(dim=1) if self._reads_pairs and sample_ids.dim() == 2 else sample_ids

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids, flat."""
        return self.token_layout(micro_batch).reshape(-1)

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the micro-batches one after the other."""
        for index, micro_batch in enumerate(micro_batches):
            begin(index)
            self._forward(self._host, micro_batch.extra[_BATCH])

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        """Find what the model finds."""
        return self._model.watching()

    def release(self) -> None:
        """Give back what the model gives back."""
        self._model.release()

    def describe(self) -> dict[str, Any]:
        """Return what the model says of itself."""
        return self._model.describe()


@dataclass(frozen=True)
class RawReader:
    """Reads batches of any kind. mask: which positions of a batch are tokens, (b, s); num_samples: as Reader's.

    Without a mask, what counts are the tokens of input_ids, (b, s), by attention_mask; in batches without these, every
    position of whatever a linear sees.
    """

    mask: Mask | None = None
    num_samples: int | None = None

    def read(self, batches: Iterable[Any]) -> Local:
        """Return this rank's batches. Raises DataError."""
        return read_ahead(batches, self._micro_batch, self.num_samples)

    def _micro_batch(self, batch: Any, where: str) -> tuple[MicroBatch, bool]:
        given = {}
        if self.mask is not None:
            mask = _checked(self.mask(batch), where)
        elif _has_tokens(batch):
            input_ids, given = token_tensors({**batch, "position_ids": None}, where)
            mask = given.get("attention_mask", torch.ones_like(input_ids)) != 0
        else:
            mask = torch.ones(_num_rows(batch), dtype=torch.bool)
        is_sample = mask if mask.dim() == 1 else mask.any(dim=1)
        rows = is_sample.long().cumsum(dim=0) - 1
        sample_ids = given.get("sample_ids", rows if mask.dim() == 1 else rows[:, None].expand_as(mask))
        sample_ids = sample_ids.clamp_min(-1).where(mask, -1)
        return MicroBatch(mask.long(), mask.long(), sample_ids, None, {_BATCH: batch}), "sample_ids" in given


def _pads(batch: Any) -> bool:
    """Tell whether a batch says of the decoder's text that it has padding."""
    if not isinstance(batch, Mapping):
        return False
    marks = ((batch.get("labels"), -100), (batch.get("decoder_attention_mask"), 0))
    return any(bool((torch.as_tensor(given) == mark).any()) for given, mark in marks if given is not None)


def _has_tokens(batch: Any) -> bool:
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return isinstance(input_ids, Tensor) and input_ids.dim() == 2


def _checked(mask: Any, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(mask).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"mask= gave for {where} what is no tensor ({error}).") from None
    if tensor.dim() != 2 or not tensor.numel():
        raise DataError(f"mask= gave shape {tuple(tensor.shape)} for {where}, expected (batch, sequence).")
    return tensor != 0


def _num_rows(batch: Any) -> int:
    """Return the first size of the first tensor in a batch, 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((_num_rows(value) for value in values if isinstance(value, Tensor | list | tuple | Mapping)), 1)
