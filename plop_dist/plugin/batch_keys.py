"""What the keys of a host's batch beside input_ids mean: passed to the forward, of no effect on it, or refused."""

# b rows, s tokens of the longest

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plop_dist.errors import DataError

READ = ("input_ids", "attention_mask", "position_ids", "sample_ids")  # by the plugin itself

# What only a loss is made of, or what the forward returns beside the activations, in every framework's batches.
_WITHOUT_EFFECT = {
    "labels", "shift_labels", "loss_mask", "completion_mask", "assistant_masks", "num_items_in_batch", "return_loss",
    "logits_to_keep", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

Takes = Callable[[str], bool | None]


def further_inputs(batch: Mapping[str, Any], where: str, takes: Takes) -> dict[str, Any]:
    """Return what the forward takes beside the keys that the plugin reads; tensors on the CPU, as they are.

    takes(key): whether the forward takes it, None where that cannot be told. A key that the forward does not take has
    no effect. Raises DataError for a tensor of which it cannot be told, and for an object that may have a state, as a
    cache of earlier tokens has: the forward would change the host's own, and tokens have other places behind it.
    """
    found = {}
    for key, value in batch.items():
        if key in READ or key in _PACKING or key in _WITHOUT_EFFECT or value is None:
            continue
        taken = takes(key)
        # Also where that cannot be told: transformers 5.24 takes past_key_values behind **kwargs, as `cache`.
        if taken is not False and not _is_data(value):
            raise DataError(
                f"{where} has '{key}', a {type(value).__name__}: an object that the forward may change, or in which "
                "earlier tokens are kept; leave it out and pass whole samples, or give score() a forward= of your own, "
                "which makes one for each batch."
            )
        if taken is None and _is_numeric(value):
            raise DataError(
                f"{where} has '{key}', of which it cannot be told whether it changes what the model computes; leave it "
                "out of the batches if it does not, or give score() a forward= of your own, which passes it on."
            )
        if taken:
            found[key] = torch.as_tensor(value).detach().cpu() if _is_array(value) else value
    return found


def packed_positions(batch: Mapping[str, Any], input_ids: Tensor, where: str) -> Tensor | None:
    """Return the positions, (b, s), of rows that cu_seq_lens_q packs, or None. input_ids: (b, s).

    Flash attention keeps samples apart by the former, every other by the latter. Raises DataError if the lengths do
    not fill the rows, or those of queries and keys differ.
    """
    given = [batch[key] for key in _PACKING[:2] if batch.get(key) is not None]
    if not given:
        return None
    ends, *other = (torch.as_tensor(one).detach().cpu().long().reshape(-1) for one in given)
    num_tokens = input_ids.numel()
    if len(ends) < 2 or int(ends[0]) or int(ends[-1]) != num_tokens or bool((ends.diff() <= 0).any()):
        raise DataError(
            f"{where}['cu_seq_lens_q'] is {ends.tolist()}, expected the starts of the samples from 0 on, and at last "
            f"the number of tokens ({num_tokens})."
        )
    if other and not torch.equal(other[0], ends):
        raise DataError(f"{where}: cu_seq_lens_q and cu_seq_lens_k differ; expected the same samples in both.")
    starts = ends[:-1].repeat_interleave(ends.diff())
    return (torch.arange(num_tokens) - starts).reshape(input_ids.shape)


def refuse_unmarked_padding(batch: Mapping[str, Any], input_ids: Tensor, pad_id: int | None, where: str) -> None:
    """Raise DataError where labels of -100 show that rows end or begin in padding which no mask marks.

    Labels themselves mark nothing: a prompt has -100 as well. pad_id: the model's; where it has none, what stands there
    at least twice in a row.
    """
    labels = batch.get("labels")
    if labels is None or batch.get("attention_mask") is not None or batch.get("sample_ids") is not None:
        return
    is_ignored = torch.as_tensor(labels).detach().cpu() == -100
    if is_ignored.shape != input_ids.shape:
        return
    for side, ids, ignored in (("begin", input_ids, is_ignored), ("end", input_ids.flip(1), is_ignored.flip(1))):
        is_pad = ignored & (ids == (ids[:, :1] if pad_id is None else pad_id))
        longest = int(is_pad.long().cumprod(dim=1).sum(dim=1).max())
        if longest > (pad_id is None):
            raise DataError(
                f"{where} has no attention_mask, and rows that {side} with token {int(ids[is_pad][0])} under labels of "
                f"-100, {longest} times in one of them: padding that would count as text; pass the attention_mask."
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_data(value: Any) -> bool:
    """Tell whether a value is made of arrays, numbers and texts alone."""
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or _is_array(value) or isinstance(value, str | bytes | int | float | complex | np.generic)


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return _is_array(value) or isinstance(value, int | float | complex)
