"""Noise that turns the largest logit into a sample: keyed, so that every layout samples what one process does."""

# b rows, V entries of the vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sampled(logits_bV: Tensor, temperature: float, keys: Sequence[str]) -> Tensor:
    """Return a token of each row drawn from softmax(logits / temperature), (b,) int64.

    It is the place of the largest logit / temperature + g, with g Gumbel noise of the row's key (Gumbel-max).
    """
    return perturbed(logits_bV, temperature, keys).argmax(dim=-1)


def perturbed(logits_bV: Tensor, temperature: float, keys: Sequence[str]) -> Tensor:
    """Return logits / temperature + g, float32: its largest entry is the sample."""
    noise_bV = torch.stack([_gumbel(key, logits_bV.shape[-1]) for key in keys])
    return logits_bV.float() / temperature + noise_bV.to(logits_bV.device)


def noise_key(seed: int, generation: int, row: int, position: int) -> str:
    """Return the key of one token of a completion: no layout, no batch and no other token changes it."""
    return f"sample:{seed}:{generation}:{row}:{position}"


def _gumbel(key: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    # -log of an exponential number is Gumbel's; drawn on the CPU, whose numbers no device changes.
    return -torch.empty(size).exponential_(generator=generator).log()
