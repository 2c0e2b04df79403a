"""How Megatron takes a micro-batch: padding behind the tokens, packed rows apart, each context rank its chunks."""

# b samples, s tokens of the longest, T tokens

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.groups import Place
from plop_dist.errors import ModelError
from plop_dist.measure.protocols import MicroBatch

IGNORED = -100  # as torch's cross entropy has it


@dataclass(frozen=True)
class Prepared:
    """A chunk's input. input_ids, position_ids, sample_ids: (b, s) int64; mask: (1 or b, 1, s, s), True = hidden.

    labels: (b, s) int64, where the micro-batch had some. further: what a loss reads besides, (b, s) each. is_packed:
    whether any row holds several samples.
    """

    input_ids: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    mask: Tensor | None
    labels: Tensor | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)
    is_packed: bool = False


class Batching:
    """How the chunks of a rank take micro-batches, and in which order their hidden states hold the tokens.

    chunks: the rank's, without wrappers; an uneven pipeline may leave any of them without layers. place: the rank's.
    """

    def __init__(self, chunks: Sequence[nn.Module], place: Place, device: torch.device) -> None:
        self._place, self._device = place, device
        masked = [_follows_mask(layer) for chunk in chunks for layer in _layers(chunk)]
        self._with_mask, self._packs = any(masked), all(masked)

    def prepare(
        self, micro_batch: MicroBatch, labels: Tensor | None = None, further: Mapping[str, Tensor] | None = None
    ) -> Prepared:
        """Return what a chunk is called with; labels and further, (b, s), move with the tokens.

        further: 0 where there are no tokens; not dealt out to context-parallel ranks. Raises ModelError for packed rows
        where any layer would let one sample see another.
        """
        place = self._place
        multiple = place.tp_size if place.is_sequence_parallel else 1
        multiple *= 2 * place.cp_size if place.cp_size > 1 else 1
        prepared = left_justify(
            micro_batch, multiple, with_mask=self._with_mask, device=self._device, labels=labels, further=further or {}
        )
        if prepared.is_packed and not self._packs:
            raise ModelError(
                "packed rows (position_ids that start again within a row) need Megatron's local attention in every "
                "layer, without a sliding window, which takes no other mask beside it, and this model has layers of "
                "another kind (Transformer Engine's, windows, state-space layers); pass one sample per row."
            )
        return prepared if place.cp_size == 1 else context_share(prepared, place.cp_rank, place.cp_size)

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample ids (s, b) in the order of this rank's hidden states: padding last, -1 where nothing counts."""
        return self.prepare(micro_batch).sample_ids.T.contiguous()

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return (T_local,) sample ids of the tokens this rank's routers see.

        Under sequence parallelism its share; otherwise all, but -1 on tensor ranks that hold copies of rank 0's.
        """
        ids_T, place = self.token_layout(micro_batch).reshape(-1), self._place
        if place.is_sequence_parallel:
            return ids_T.chunk(place.tp_size)[place.tp_rank]
        return ids_T if place.tp_rank == 0 else torch.full_like(ids_T, -1)


def left_justify(
    micro_batch: MicroBatch,
    multiple: int,
    *,
    with_mask: bool,
    device: torch.device,
    labels: Tensor | None = None,
    further: Mapping[str, Tensor] = MappingProxyType({}),
) -> Prepared:
    """Return the micro-batch with every row's padding moved behind its real tokens, s rounded up to `multiple`.

    Real tokens then see exactly what they would see alone under causal attention, whatever the side of padding, and
    Megatron's rotary embedding, which counts places and not position_ids, starts at the first real token.
    Packed rows (position_ids that start again) get a block-diagonal mask.
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
    mask = None
    if with_mask:
        mask = (places[0][:, None] < places[0][None, :])[None, None]
        if segment is not None:
            mask = mask | (segment[:, None, :, None] != segment[:, None, None, :])
    if segment is not None:
        places = arrange(micro_batch.position_ids, 0)  # type: ignore[arg-type]
    moved = None if labels is None else arrange(labels, IGNORED).where(real, IGNORED)
    besides = {name: arrange(tensor, 0) for name, tensor in further.items()}
    is_packed = segment is not None
    return Prepared(input_ids, places.contiguous(), sample_ids, mask, moved, besides, is_packed=is_packed)


def _layers(chunk: Any) -> Sequence[nn.Module]:
    return getattr(getattr(chunk, "decoder", None), "layers", ())


def _follows_mask(layer: Any) -> bool:
    """Tell whether a layer's attention goes by the mask that it is given: Megatron's own, without a window."""
    attention: Any = getattr(getattr(layer, "self_attention", None), "core_attention", None)
    if type(attention).__name__ != "DotProductAttention":
        return False
    return getattr(attention.scale_mask_softmax, "window_size", None) is None


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

    labels = None if prepared.labels is None else share(prepared.labels)
    return Prepared(share(prepared.input_ids), share(prepared.position_ids), share(prepared.sample_ids), None, labels)
