"""Gains by float64 brute force: plain hooks keep what each linear map reads, the weights do the rest.

Deliberately simple and independent of the package: one sample at a time, no padding, no squared norms, no shards.
"""

# T vectors that a module read, I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plop_dist.types import SampleTotals


def inputs_of(model: nn.Module, sample: Sequence[int]) -> dict[str, Tensor]:
    """Return what every linear map read for one sample run alone, by path: (T, I) float64, calls in order."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2).double())
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(sample)]))
    for handle in handles:
        handle.remove()
    return {path: torch.cat(calls) for path, calls in seen.items()}


def weights_of(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return path of the module that holds it and weight, (O, I) float64, of every logical projection."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (path, module.weight.detach().double())
        elif isinstance(module, Conv1D):
            weight_OI = module.weight.detach().double().T
            if path.endswith(".c_attn"):
                for name, part_OI in zip(("q_proj", "k_proj", "v_proj"), weight_OI.chunk(3), strict=True):
                    found[path.removesuffix("c_attn") + name] = (path, part_OI)
            else:
                found[path] = (path, weight_OI)
    return found


def brute_force(model: nn.Module, samples: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
    """Return ||W z_t|| / ||z_t|| of each projection, (T,) float64 per sample; NaN where ||z_t|| is 0 or not finite."""
    weights = weights_of(model)
    gains: dict[str, list[Tensor]] = {fqn: [] for fqn in weights}
    for sample in samples:
        inputs = inputs_of(model, sample)
        for fqn, (holder, weight_OI) in weights.items():
            z_TI = inputs[holder]
            norm_T = z_TI.norm(dim=1)
            norm_T[~norm_T.isfinite()] = torch.nan
            gains[fqn].append((z_TI @ weight_OI.T).norm(dim=1) / norm_T)
    return gains


def assert_totals(totals: SampleTotals, expected: Mapping[str, Sequence[Tensor]], rtol: float = 1e-5) -> None:
    """Assert that the sums are those of these gains, for every module and sample, and the skipped tokens theirs."""
    assert set(totals.fqns) == set(expected)
    for row, fqn in enumerate(totals.fqns):
        gains = [gain_T[gain_T.isfinite()] for gain_T in expected[fqn]]
        wanted = [float(gain_T.sum()) for gain_T in gains]
        np.testing.assert_allclose(totals.gain_total[row], wanted, rtol=rtol, err_msg=fqn)
        assert totals.num_tokens[row].tolist() == [len(gain_T) for gain_T in gains], fqn
        skipped = [int((~gain_T.isfinite()).sum()) for gain_T in expected[fqn]]
        assert totals.num_skipped[row].tolist() == skipped, fqn
