"""The adapter every engine starts from: drawn whole from (seed, fqn), so that no layout starts elsewhere."""

# R rank, I in_features, O out_features

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def initial_adapter(fqn: str, in_features: int, out_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the initial (A, B) of one module: A (R, I) and B (O, R), whole, float32, on the CPU.

    A is uniform on [-1/sqrt(I), 1/sqrt(I)], which is PEFT's default (Kaiming uniform with a = sqrt(5)); B is zero.
    Keyed by (seed, fqn) alone: every rank draws the same values and keeps its shard. `fqn` is the logical path.
    """
    key = hashlib.sha256(f"adapter:{seed}:{fqn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator), torch.zeros(out_features, rank)


def reset_peft_adapter(model: torch.nn.Module, seed: int, adapter_name: str = "default") -> None:
    """Overwrite the adapter of a model that PEFT has just wrapped by the initial one, in place.

    The model must hold its adapter whole (one process, or ZeRO 0 to 2, or inside GatheredParameters). Works on
    PeftModel and on models with injected adapters.
    """
    with torch.no_grad():
        for path, module in model.named_modules():
            if adapter_name not in getattr(module, "lora_A", {}):
                continue
            down, up = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
            fqn = path.removeprefix("base_model.model.")
            A, B = initial_adapter(fqn, down.shape[1], up.shape[0], down.shape[0], seed)
            down.copy_(A)
            up.copy_(B)
