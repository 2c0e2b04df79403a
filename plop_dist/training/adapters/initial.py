"""The adapter every engine starts from: drawn whole from (seed, fqn), so that no layout starts elsewhere."""

# R rank, I in_features

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.training.adapters.shards import AdapterShard


@torch.no_grad()
def set_initial(shards: Sequence[AdapterShard], seed: int) -> None:
    """Overwrite adapters by their initial values, in place: this rank's part of A, and zeros for B.

    Every rank draws the same whole A; nothing is sent. At ZeRO-3 parameters must be gathered.
    """
    for shard in shards:
        rank, in_features = shard.whole_shape
        shard.A.copy_(shard.own_part(draw_initial(shard.fqn, in_features, rank, seed)))
        shard.B.zero_()


def draw_initial(fqn: str, in_features: int, rank: int, seed: int) -> Tensor:
    """Return the initial A (R, I) of one module, whole, float32, on the CPU.

    Uniform on [-1/sqrt(I), 1/sqrt(I)], which is PEFT's default (Kaiming uniform with a = sqrt(5)). Keyed by
    (seed, fqn) alone: no layout and no order of modules changes it. `fqn` is the logical path.
    """
    key = hashlib.sha256(f"adapter:{seed}:{fqn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def agreed_seed() -> int:
    """Return a seed that rank 0 draws from its random state, on every rank. Collective over the world."""
    drawn: list[int] = [int(torch.randint(1 << 31, ()))]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]
