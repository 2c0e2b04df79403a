"""A training micro-batch: what a model reads of it, and the loss of what the model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from plop_dist.backends.hf.model import is_packed
from plop_dist.training.logits import IGNORED, Batch, Objective, Read, WholeLogits

# input_ids, attention_mask, labels, position_ids: (batch, sequence) int64; what else the model reads, of any shape
__all__ = ["IGNORED", "Batch"]
_OWN = ("input_ids", "attention_mask", "labels", "position_ids")
# What an objective reads besides labels, (batch, sequence) float32: see grpo/loss.py
OBJECTIVE_KEYS = ("weights", "advantages", "old", "reference", "importance")


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a transformers model's forward pass for this micro-batch.

    Packed rows go without a mask: only then transformers keeps samples apart, by their position_ids. Padding, always on
    the right, is out of the real tokens' sight even so. Beside images the model finds the positions by itself.
    """
    further = {name: value for name, value in batch.items() if name not in (*_OWN, *OBJECTIVE_KEYS)}
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False, **further}
    if not further:
        inputs["position_ids"] = batch["position_ids"]
    if not is_packed(batch["position_ids"], batch["attention_mask"]):
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs


def sum_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy of the next tokens, float32 scalar; labels of -100 are left out.

    logits: (batch, sequence, vocab), any float dtype; labels: (batch, sequence), not shifted.
    """
    targets = labels[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(-1, logits.size(-1)).float()
    return cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")


def row_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the same for each row: (batch,), float32."""
    predictions = logits[:, :-1].float().transpose(1, 2)
    return cross_entropy(predictions, labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(dim=1)


def batch_loss(model: Callable[..., Any], batch: Batch, objective: Objective | None = None) -> Tensor:
    """Return the summed loss of what a model answers that is called as transformers' are; None: sum_token_losses."""
    logits = model(**model_inputs(batch)).logits
    return sum_token_losses(logits, batch["labels"]) if objective is None else objective(WholeLogits(logits), batch)


def read_batch(model: Callable[..., Any], batch: Batch, read: Read) -> Tensor:
    """Return what is read of the logits that such a model answers."""
    return read(WholeLogits(model(**model_inputs(batch)).logits), batch)


@torch.no_grad()
def row_losses(model: Callable[..., Any], micro_batches: Iterable[Batch]) -> list[float]:
    """Return row_token_losses of all rows, one micro-batch after the other, as batch_loss calls the model."""
    losses = (row_token_losses(model(**model_inputs(batch)).logits, batch["labels"]) for batch in micro_batches)
    return [loss for rows in losses for loss in rows.tolist()]


def count_targets(batch: Batch) -> int:
    """Return how many next tokens of the micro-batch have a label."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def without_targets(batch: Batch) -> Batch:
    """Return the same rows without any label."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the micro-batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
