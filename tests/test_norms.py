"""The mathematics of one weight, against float64 brute force and against many sampled directions."""

# T tokens, I in_features, O out_features, K directions

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plop_dist import norms

SHAPES = [(24, 48), (48, 24), (3, 40), (40, 3)]


def spoiled_weight(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Return (O, I) float64 with rows of very different scales that share two directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared_OI = normal(num_rows, 2) @ normal(2, num_columns)
    return torch.exp(normal(num_rows, 1)) * (normal(num_rows, num_columns) + shared_OI)


def sampled(weight_OI: Tensor, num_directions: int, seed: int) -> tuple[float, float]:
    """Return the plain float64 mean of ||W u|| over random directions, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    u_KI = torch.randn(num_directions, weight_OI.shape[1], generator=generator, dtype=torch.float64)
    norms_K = (u_KI @ weight_OI.T).norm(dim=1) / u_KI.norm(dim=1)
    return float(norms_K.mean()), float(norms_K.std() / math.sqrt(num_directions))


def sq_norms(weight_OI: Tensor, u_KI: Tensor) -> Tensor:
    return (u_KI.double() @ weight_OI.T).square().sum(dim=1)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_gains_equal_brute_force(
    tokens: int, sizes: tuple[int, int], scale: float, dtype: torch.dtype, seed: int
) -> None:
    weight_OI = spoiled_weight(*sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    z_TI = (scale * torch.randn(tokens, sizes[1], generator=generator)).to(dtype)
    y_TO = (z_TI.double() @ weight_OI.T).to(dtype)
    expected_T = [
        math.sqrt(sum(value * value for value in y.tolist())) / math.sqrt(sum(value * value for value in z.tolist()))
        for y, z in zip(y_TO, z_TI, strict=True)
    ]
    gain_T = norms.gains(norms.local_sq_norm(z_TI), norms.local_sq_norm(y_TO))
    assert gain_T.dtype == torch.float32
    torch.testing.assert_close(gain_T.double(), torch.tensor(expected_T, dtype=torch.float64), rtol=2e-6, atol=0)


def test_squared_norms_add_up_over_shards_of_any_stride() -> None:
    y_TO = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0))
    whole = norms.local_sq_norm(y_TO)
    assert whole.shape == (12,)
    torch.testing.assert_close(norms.local_sq_norm(y_TO[..., :3]) + norms.local_sq_norm(y_TO[..., 3:]), whole)
    strided = y_TO.transpose(0, 1)
    assert torch.equal(norms.local_sq_norm(strided), norms.local_sq_norm(strided.contiguous()))


def test_no_gain_is_finite_for_a_zero_token() -> None:
    gain_T = norms.gains(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 9.0]))
    assert not gain_T[0].isfinite()
    assert float(gain_T[1]) == 1.5


def test_directions_are_keyed_by_seed_and_path_alone() -> None:
    first = norms.directions(0, "model.layers.0.q_proj", 8, 16)
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(first, norms.directions(0, "model.layers.0.q_proj", 8, 16))
    assert not torch.equal(first, norms.directions(1, "model.layers.0.q_proj", 8, 16))
    assert not torch.equal(first, norms.directions(0, "model.layers.1.q_proj", 8, 16))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    mean_I = norms.directions(0, "x", 20_000, 4).mean(dim=0)
    assert float(mean_I.abs().max()) < 5 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_equals_many_directions_within_their_error(shape: tuple[int, int]) -> None:
    weight_OI = spoiled_weight(*shape)
    mean, stderr = sampled(weight_OI, 100_000, seed=1)
    inner = norms.exact(weight_OI.T @ weight_OI, shape[1]).value
    outer = norms.exact(weight_OI @ weight_OI.T, shape[1]).value
    assert stderr / mean < 3e-3
    assert abs(inner - mean) < 4 * stderr
    assert inner == pytest.approx(outer, rel=1e-9)


def test_exact_where_it_is_known_in_closed_form() -> None:
    assert norms.exact(4 * torch.eye(7, dtype=torch.float64), 7).value == pytest.approx(2.0, rel=1e-10)
    one_row = torch.zeros(1, 3, dtype=torch.float64)
    one_row[0, 0] = 5.0
    assert norms.exact(one_row @ one_row.T, 3).value == pytest.approx(2.5, rel=1e-9)  # |u_1| is uniform on [0, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_control_variate_is_unbiased_and_beats_plain_sampling(shape: tuple[int, int]) -> None:
    weight_OI = spoiled_weight(*shape)
    truth = norms.exact(weight_OI.T @ weight_OI, shape[1]).value
    weight_sq = float(weight_OI.square().sum())
    errors: dict[str, list[float]] = {"gaussian": [], "control_variate": []}
    stderrs: dict[str, list[float]] = {"gaussian": [], "control_variate": []}
    for seed in range(60):
        x_K = sq_norms(weight_OI, norms.directions(seed, "w", 64, shape[1]))
        for name, found in (
            ("gaussian", norms.gaussian(x_K)),
            ("control_variate", norms.control_variate(x_K, weight_sq, shape[1])),
        ):
            errors[name].append(found.value / truth - 1)
            stderrs[name].append(found.stderr / truth)
    rms = {name: math.sqrt(sum(e * e for e in values) / len(values)) for name, values in errors.items()}
    assert rms["control_variate"] < 0.6 * rms["gaussian"]
    for name, values in errors.items():
        assert abs(sum(values) / len(values)) < 4 * rms[name] / math.sqrt(len(values)), name
        typical = sum(stderrs[name]) / len(stderrs[name])
        assert 0.5 < typical / rms[name] < 1.6, name  # the reported error is the real one


def test_control_variate_equals_its_formula() -> None:
    weight_OI = spoiled_weight(5, 8)
    x_K = sq_norms(weight_OI, norms.directions(3, "w", 16, 8))
    weight_sq = float(weight_OI.square().sum())
    root = math.sqrt(weight_sq / 8)
    terms = [math.sqrt(x) - root - (x - root**2) / (2 * root) for x in x_K.tolist()]
    found = norms.control_variate(x_K, weight_sq, 8)
    assert found.value == pytest.approx(root + math.fsum(terms) / 16, rel=1e-12)
    assert norms.gaussian(x_K).value == pytest.approx(math.fsum(map(math.sqrt, x_K.tolist())) / 16, rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(2, 12), seed=st.integers(0, 100))
def test_closed_form_bounds_the_exact_value_from_above(rows: int, columns: int, seed: int) -> None:
    weight_OI = spoiled_weight(rows, columns, seed=seed)
    bound = norms.closed_form(float(weight_OI.square().sum()), columns)
    assert bound.value == pytest.approx(math.sqrt(sum(v * v for v in weight_OI.flatten().tolist()) / columns))
    assert bound.stderr == 0
    exact = norms.exact(weight_OI.T @ weight_OI, columns).value
    assert 0 < exact <= bound.value * (1 + 1e-9)
