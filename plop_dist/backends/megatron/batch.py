"""How Megatron takes a micro-batch: padding behind the tokens, packed rows apart, each context rank its chunks."""

# b samples, s tokens of the longest

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plop_dist.errors import ModelError
from plop_dist.measure.protocols import MicroBatch


@dataclass(frozen=True)
class Prepared:
    """A chunk's input. input_ids, position_ids, sample_ids: (b, s); mask: (1 or b, 1, s, s), True = hidden."""

    input_ids: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    mask: Tensor | None


def left_justify(micro_batch: MicroBatch, multiple: int, *, with_mask: bool, device: torch.device) -> Prepared:
    """Return the micro-batch with every row's padding moved behind its real tokens, s rounded up to `multiple`.

    Real tokens then see exactly what they would see alone under causal attention, whatever the side of padding, and
    Megatron's rotary embedding, which counts places and not position_ids, starts at the first real token.
    Packed rows (position_ids that start again) get a block-diagonal mask; without local attention: ModelError.
    """
    order = torch.argsort((micro_batch.attention_mask == 0).to(torch.int8), dim=1, stable=True)
    keep = int((micro_batch.attention_mask != 0).sum(dim=1).max().clamp_min(1))
    extra = -keep % multiple

    def arrange(tensor: Tensor, filler: int) -> Tensor:
        moved = tensor.gather(1, order.to(tensor.device))[:, :keep]
        return nn.functional.pad(moved, (0, extra), value=filler).to(device)

    input_ids = arrange(micro_batch.input_ids, 0)
    real = arrange(micro_batch.attention_mask, 0) != 0
    sample_ids = arrange(micro_batch.sample_ids, -1).where(real, -1)
    places = torch.arange(keep + extra, device=device).expand_as(input_ids)
    segment = _segments(micro_batch, arrange, real)
    is_packed = segment is not None
    if is_packed and not with_mask:
        raise ModelError(
            "packed rows (position_ids that start again within a row) need Megatron's local attention, and this model "
            "uses Transformer Engine's; pass one sample per row."
        )
    mask = None
    if with_mask:
        mask = (places[0][:, None] < places[0][None, :])[None, None]
        if segment is not None:
            mask = mask | (segment[:, None, :, None] != segment[:, None, None, :])
    if segment is not None:
        places = arrange(micro_batch.position_ids, 0)  # type: ignore[arg-type]
    return Prepared(input_ids, places.contiguous(), sample_ids, mask)


def _segments(micro_batch: MicroBatch, arrange: Callable[[Tensor, int], Tensor], real: Tensor) -> Tensor | None:
    """Return which packed sample each token belongs to, (b, s), or None where rows hold one sample each."""
    if micro_batch.position_ids is None:
        return None
    positions = arrange(micro_batch.position_ids, 0)
    restarts = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:]
    if not restarts.any():
        return None
    return nn.functional.pad(restarts, (1, 0)).cumsum(dim=1)


def context_share(prepared: Prepared, cp_rank: int, cp_size: int) -> Prepared:
    """Return this context-parallel rank's two of the 2 * cp_size chunks of s, as Megatron deals them out."""

    def share(tensor: Tensor) -> Tensor:
        chunks = tensor.chunk(2 * cp_size, dim=1)
        return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]], dim=1)

    return Prepared(share(prepared.input_ids), share(prepared.position_ids), share(prepared.sample_ids), None)
