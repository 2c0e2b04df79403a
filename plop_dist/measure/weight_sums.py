"""What one rank's part of a weight contributes to its baseline: sums that add up over shards, from one read of it.

Column-parallel parts contribute squared norms ||W_r u||^2, row-parallel ones the vectors W_r u_r, whose squares would
lack the cross terms. The weight is read by blocks of rows, so that beside it there are only a few such blocks.
"""

# I in_features, O out_features (o, p of blocks), K directions

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure import norms
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import LocalWeight
from plop_dist.measure.weight import Weight

BLOCK_BYTES = 16 << 20  # the most of a block of rows in float32; no more than four such blocks are held at once
_CACHED_VALUES = 1 << 18  # of a block per thread of the CPU, which then finds it in its cache when it is used again
_FEWEST_ROWS = 32  # of a block per thread: a matmul of fewer rows is slow

Estimate = Callable[[float, Sequence[Tensor]], Baseline]


@dataclass(frozen=True)
class WeightSums:
    """The sums of one projection: ||W||_F^2 first, (1,) float64, then what its estimate needs beside it, any shapes.

    estimate(||W||_F^2, parts): the baseline from the sums over all shards of a finite weight that is not 0.
    """

    parts: tuple[Tensor, ...]
    estimate: Estimate

    def finish(self, parts: Sequence[Tensor]) -> Baseline:
        """Return the baseline from the parts summed over all shards: NaN for a weight that is not finite, 0 for 0."""
        weight_sq = float(parts[0])
        if not math.isfinite(weight_sq):
            return Baseline(math.nan, 0.0)
        return self.estimate(weight_sq, parts) if weight_sq > 0 else Baseline(0.0, 0.0)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)  # a host's autocast must not round what belongs to the weight alone
def compute_sums(local: LocalWeight, estimator: EstimatorConfig) -> WeightSums:
    """Return one local weight's sums. Local; reads the weight once (`exact` of wide weights: once per pair of blocks).

    Its columns stand for local.in_index of the directions where they are a shard.
    """
    weight, in_features = local.weight, local.projection.in_features
    is_row = local.is_sharded and local.in_index is not None
    if estimator.baseline == "closed_form":
        return WeightSums((_weight_sq(weight),), lambda weight_sq, _: norms.closed_form(weight_sq, in_features))
    if estimator.baseline == "exact":
        is_wide = not local.is_sharded and weight.shape[0] < weight.shape[1]
        gram = _gram_of_rows(weight) if is_row or is_wide else _gram_of_columns(weight)
        return WeightSums((_weight_sq(weight), gram), lambda _, parts: norms.exact(parts[1], in_features))
    u_KI = norms.directions(estimator.seed, local.projection.fqn, estimator.num_directions, in_features)
    parts = _products(weight, u_KI[:, local.in_index]) if is_row else _product_norms(weight, u_KI)

    def estimate(weight_sq: float, parts: Sequence[Tensor]) -> Baseline:
        x_K = norms.column_sq(parts[1]) if is_row else parts[1]
        if estimator.baseline == "gaussian":
            return norms.gaussian(x_K)
        return norms.control_variate(x_K, weight_sq, in_features)

    return WeightSums(parts, estimate)


def float_blocks(weight: Weight, num_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
    """Yield all rows in turn as float32, (o, I), of at most num_bytes.

    Views of the weight where it is stored so; else of memory that the next block overwrites.
    """
    if weight.device.type == "cpu":
        num_values = torch.get_num_threads() * max(_CACHED_VALUES, _FEWEST_ROWS * weight.shape[1])
        num_bytes = min(num_bytes, 4 * num_values)
    buffer = None
    for block_oI in weight.blocks(num_bytes):
        if block_oI.dtype == torch.float32:
            yield block_oI.detach()
            continue
        if buffer is None:
            buffer = torch.empty(block_oI.shape, dtype=torch.float32, device=block_oI.device)
        yield buffer[: len(block_oI)].copy_(block_oI.detach())


def _weight_sq(weight: Weight) -> Tensor:
    total = torch.zeros(1, dtype=torch.float64, device=weight.device)
    for w_oI in float_blocks(weight):
        total += norms.weight_sq(w_oI)
    return total


def _product_norms(weight: Weight, u_KI: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||W||_F^2, (1,), and ||W u_k||^2, (K,), both float64."""
    for dtype in (torch.float32, torch.float64):
        u_IK = u_KI.to(weight.device, dtype).T
        weight_sq = torch.zeros(1, dtype=torch.float64, device=weight.device)
        x_K = torch.zeros(len(u_KI), dtype=torch.float64, device=weight.device)
        for w_oI in float_blocks(weight):
            weight_sq += norms.weight_sq_float32(w_oI)
            x_K += norms.column_sq_float32(w_oI.to(dtype) @ u_IK)
        if x_K.isfinite().all() or not weight_sq.isfinite():
            break  # else the weight is finite, but too large for its products in float32
    return weight_sq, x_K


def _products(weight: Weight, u_KI: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||W||_F^2, (1,) float64, and W u_k, (O, K) float32."""
    u_IK = u_KI.to(weight.device).T
    weight_sq = torch.zeros(1, dtype=torch.float64, device=weight.device)
    wu_OK = torch.empty(weight.shape[0], len(u_KI), device=weight.device)
    start = 0
    for w_oI in float_blocks(weight):
        weight_sq += norms.weight_sq_float32(w_oI)
        torch.mm(w_oI, u_IK, out=wu_OK[start : start + len(w_oI)])
        start += len(w_oI)
    return weight_sq, wu_OK


def _gram_of_columns(weight: Weight) -> Tensor:
    """Return W^T W, (I, I) float64, which adds up over shards of rows."""
    gram_II = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for w_oI in float_blocks(weight):
        w_oI = w_oI.double()
        gram_II.addmm_(w_oI.T, w_oI)
    return gram_II


def _gram_of_rows(weight: Weight) -> Tensor:
    """Return W W^T, (O, O) float64, which adds up over shards of columns."""
    gram_OO = torch.empty(weight.shape[0], weight.shape[0], dtype=torch.float64, device=weight.device)
    stop = 0
    for w_oI in float_blocks(weight, BLOCK_BYTES // 2):
        w_oI = w_oI.double()
        start, stop, column = stop, stop + len(w_oI), 0
        for w_pI in float_blocks(weight.narrow(0, stop), BLOCK_BYTES // 2):
            product_op = w_oI @ w_pI.double().T
            gram_OO[start:stop, column : column + len(w_pI)] = product_op
            gram_OO[column : column + len(w_pI), start:stop] = product_op.T
            column += len(w_pI)
    return gram_OO
