"""What a weight contributes to its baseline, from one read by blocks: exact, finite, and in little memory."""

# I in_features, O out_features, K directions

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure import norms, weight_sums
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import LocalWeight
from plop_dist.measure.weight import Weight
from plop_dist.measure.weight_sums import compute_sums
from plop_dist.values.scores import Projection

ESTIMATORS = ("control_variate", "gaussian", "closed_form", "exact")
K = 8


def local(weight: Weight | Tensor, **shard: Any) -> LocalWeight:
    weight = Weight.of(weight) if isinstance(weight, Tensor) else weight
    rows, columns = weight.shape
    projection = Projection(fqn="layers.0.up", type="up", in_features=shard.pop("I", columns), out_features=rows)
    return LocalWeight(projection, weight, **shard)


def baseline(weight: Weight | Tensor, estimator: str) -> Baseline:
    sums = compute_sums(local(weight), EstimatorConfig(baseline=estimator, num_directions=K))
    return sums.finish(sums.parts)


def uneven(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(num_rows, 1, generator=generator))
    return scale * (torch.randn(num_rows, num_columns, generator=generator) + 1)


def in_float64(weight_OI: Tensor, estimator: str) -> Baseline:
    """Return the baseline by the formulas, the whole weight at once."""
    w = weight_OI.double()
    fro, num_columns = float(w.square().sum()), w.shape[1]
    if estimator == "closed_form":
        return norms.closed_form(fro, num_columns)
    if estimator == "exact":
        return norms.exact(w.T @ w, num_columns)
    x_K = (w @ norms.directions(0, "layers.0.up", K, num_columns).double().T).square().sum(dim=0)
    return norms.gaussian(x_K) if estimator == "gaussian" else norms.control_variate(x_K, fro, num_columns)


@pytest.fixture(params=[1 << 8, 1 << 12, 16 << 20])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(weight_sums, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(weight_sums.float_blocks, "__defaults__", (request.param,))  # bound when it was defined
    return request.param


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(37, 20), (20, 37), (1, 5), (64, 1)])
@pytest.mark.parametrize("layout", ["float32", "bfloat16", "transposed"])
def test_blocks_of_any_size_give_the_estimate_of_the_whole(
    estimator: str, shape: tuple[int, int], layout: str, block_bytes: int
) -> None:
    weight_OI = uneven(*shape)
    if layout == "bfloat16":
        weight_OI = weight_OI.bfloat16()
    elif layout == "transposed":
        weight_OI = weight_OI.T.contiguous().T
    found, expected = baseline(weight_OI, estimator), in_float64(weight_OI, estimator)
    # The products with directions are in float32, as the model's own are.
    rel = 1e-12 if estimator == "closed_form" else 1e-9 if estimator == "exact" else 1e-6
    assert found.value == pytest.approx(expected.value, rel=rel)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-4, abs=1e-6 * expected.value)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize("is_row", [False, True])
def test_sums_of_shards_add_up(estimator: str, num_shards: int, is_row: bool, block_bytes: int) -> None:
    weight_OI, config = uneven(36, 24), EstimatorConfig(baseline=estimator, num_directions=K)
    width = (24 if is_row else 36) // num_shards
    shards = []
    for rank in range(num_shards):
        own = slice(rank * width, (rank + 1) * width)
        part = weight_OI[:, own] if is_row else weight_OI[own]
        shard = local(part, I=24, is_sharded=True, in_index=own if is_row else None)
        shards.append(compute_sums(shard, config))
    parts = [sum(tensors[1:], tensors[0]) for tensors in zip(*(shard.parts for shard in shards), strict=True)]
    found, expected = shards[0].finish(parts), in_float64(weight_OI, estimator)
    assert found.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entry_anywhere_makes_it_nan(estimator: str, bad: float, block_bytes: int) -> None:
    weight_OI = uneven(70, 20)
    weight_OI[69, 19] = bad
    assert np.isnan(baseline(weight_OI, estimator).value)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-36, 1e-22, 1e18, 1e25, 1e34])
def test_a_finite_weight_is_never_called_otherwise(estimator: str, scale: float) -> None:
    """Its squares leave float32's range long before its entries do."""
    weight_OI = uneven(37, 20)
    scaled = baseline(weight_OI * scale, estimator).value / scale
    assert scaled == pytest.approx(baseline(weight_OI, estimator).value, rel=1e-5)


@pytest.mark.parametrize("estimator", ["control_variate", "gaussian", "closed_form"])
def test_products_beyond_float32_are_done_again_in_float64(estimator: str) -> None:
    weight_OI = torch.full((6, 4096), 3e38)
    found = baseline(weight_OI, estimator)
    assert found.value == pytest.approx(in_float64(weight_OI, estimator).value, rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_weight_of_zeros_is_0(estimator: str) -> None:
    assert baseline(torch.zeros(5, 4), estimator) == Baseline(0.0, 0.0)


@pytest.mark.parametrize("estimator", ["control_variate", "gaussian", "closed_form"])
def test_every_row_is_read_once(estimator: str, block_bytes: int) -> None:
    weight_OI, rows = uneven(90, 20), []

    def read(start: int, stop: int) -> Tensor:
        rows.extend(range(start, stop))
        return weight_OI[start:stop]

    baseline(Weight((90, 20), weight_OI.dtype, weight_OI.device, read), estimator)
    assert rows == list(range(90))


class Live(TorchDispatchMode):
    """Follows how many bytes of tensors made inside the block are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for storage in storages(out):
            if storage._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("estimator", "shape"), [("control_variate", (6000, 8192)), ("closed_form", (6000, 8192)),
                                                  ("exact", (300, 40_000)), ("exact", (40_000, 300))])  # fmt: skip
def test_at_most_64_mb_lie_beside_a_large_weight(estimator: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = torch.ones(1, 1, dtype=dtype).expand(shape)  # takes no memory itself
    with Live() as live:
        baseline(weight_OI, estimator)
    assert 1 << 17 < live.peak <= 64 << 20
