"""Gains by brute force, independent of the package: one sample at a time, no padding, float64 throughout."""

# T tokens, I in_features, O out_features

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Truth:
    """What one projection does to one sample: its float64 inputs, (T, I), and weight, (O, I)."""

    z_TI: Tensor
    weight_OI: Tensor

    @property
    def gains(self) -> Tensor:
        """||W z_t|| / ||z_t||, (T,)."""
        return (self.z_TI @ self.weight_OI.T).norm(dim=1) / self.z_TI.norm(dim=1)


def brute_force(model: nn.Module, samples: Sequence[Sequence[int]]) -> dict[str, list[Truth]]:
    """Return per logical projection what it does to each sample.

    The bias is not part of it. A Conv1D named c_attn is read as query, key and value, a third of its outputs each.
    """
    model = copy.deepcopy(model).double()
    found: dict[str, list[Truth]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
            parts = {name: weight}
            if name.endswith("c_attn"):
                thirds = weight.chunk(3)
                parts = {
                    name.replace("c_attn", kind): third
                    for kind, third in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True)
                }

            def note(_: nn.Module, args: tuple[Tensor, ...], parts: dict[str, Tensor] = parts) -> None:
                z_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                for fqn, weight_OI in parts.items():
                    found[fqn].append(Truth(z_TI, weight_OI))

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([list(sample)]))
    for handle in handles:
        handle.remove()
    return dict(found)
