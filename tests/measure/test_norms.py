"""Per-token norms and the four estimates of b(W) against float64 brute force."""

# T tokens, I in_features, O out_features, K directions

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plop_dist.measure import norms

SHAPES = st.tuples(st.integers(1, 24), st.integers(2, 40))
FEW = settings(max_examples=12, deadline=None)


def matrix(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return a weight with rows of very different scales and one dominant direction, (O, I) float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return torch.exp(normal(out_features, 1)) * (normal(out_features, in_features) + normal(1, in_features))


def sq_norms(weight_OI: Tensor, u_KI: Tensor) -> Tensor:
    return (u_KI.double() @ weight_OI.T).square().sum(dim=1)


@FEW
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_gains_equal_brute_force(shape: tuple[int, int], seed: int) -> None:
    weight_OI = matrix(*shape, seed)
    z_TI = matrix(7, shape[1], seed + 1)
    gain_T = norms.gains(norms.local_sq_norm(z_TI.float()), norms.local_sq_norm((z_TI @ weight_OI.T).float()))
    expected_T = torch.stack([(weight_OI @ z).norm() / z.norm() for z in z_TI])
    torch.testing.assert_close(gain_T.double(), expected_T, rtol=1e-6, atol=0)


@FEW
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_squared_norms_of_shards_add_up_in_any_layout(shape: tuple[int, int], seed: int) -> None:
    y_TO = matrix(6, max(shape), seed).float()
    whole_T = norms.local_sq_norm(y_TO)
    torch.testing.assert_close(whole_T.double(), y_TO.double().square().sum(dim=1), rtol=1e-6, atol=0)
    shards = [norms.local_sq_norm(shard) for shard in y_TO.chunk(2, dim=1)]
    torch.testing.assert_close(torch.stack(shards).sum(dim=0), whole_T, rtol=1e-6, atol=0)
    assert torch.equal(norms.local_sq_norm(y_TO.view(2, 3, 1, -1)), whole_T)
    torch.testing.assert_close(norms.local_sq_norm(y_TO.T.contiguous().T), whole_T, rtol=1e-6, atol=0)


def test_bfloat16_is_squared_in_float32() -> None:
    y_TO = matrix(5, 4000, 0).bfloat16()
    found_T = norms.local_sq_norm(y_TO)
    assert found_T.dtype == torch.float32
    torch.testing.assert_close(found_T.double(), y_TO.double().square().sum(dim=1), rtol=1e-5, atol=0)


def test_zero_and_non_finite_tokens_have_no_finite_gain_or_input() -> None:
    z_TI = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [3.0, 4.0]])
    in_sq_T = norms.local_sq_norm(z_TI)
    valid_T = norms.gains(in_sq_T, norms.local_sq_norm(2 * z_TI)).isfinite() & in_sq_T.isfinite()
    assert valid_T.tolist() == [False, False, False, True]


@FEW
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_sampled_and_closed_estimates_equal_their_formulas(shape: tuple[int, int], seed: int) -> None:
    weight_OI, (_, in_features) = matrix(*shape, seed), shape
    u_KI = norms.directions(seed, "layer", 9, in_features)
    values = [float((weight_OI @ u).norm()) for u in u_KI.double()]
    x_K = sq_norms(weight_OI, u_KI)
    found = norms.gaussian(x_K)
    values_K = torch.tensor(values, dtype=torch.float64)
    assert found.value == pytest.approx(sum(values) / 9, rel=1e-12)
    assert found.stderr == pytest.approx(float(values_K.std()) / 3, rel=1e-9, abs=1e-15)
    weight_sq = float(sum(entry**2 for entry in weight_OI.flatten().tolist()))
    root = (weight_sq / in_features) ** 0.5
    assert norms.closed_form(weight_sq, in_features) == norms.Baseline(pytest.approx(root, rel=1e-12), 0.0)
    corrected = [root + (v - root - (v**2 - root**2) / (2 * root)) for v in values]
    assert norms.control_variate(x_K, weight_sq, in_features).value == pytest.approx(sum(corrected) / 9, rel=1e-12)


@FEW
@given(in_features=st.integers(1, 40), scale=st.floats(1e-4, 1e4))
def test_every_estimate_of_a_scaled_identity_is_its_scale(in_features: int, scale: float) -> None:
    weight_OI = scale * torch.eye(in_features, dtype=torch.float64)
    x_K = sq_norms(weight_OI, norms.directions(0, "identity", 4, in_features))
    weight_sq = float(weight_OI.square().sum())
    assert norms.exact(weight_OI.T @ weight_OI, in_features).value == pytest.approx(scale, rel=1e-9)
    assert norms.closed_form(weight_sq, in_features).value == pytest.approx(scale, rel=1e-9)
    assert norms.gaussian(x_K).value == pytest.approx(scale, rel=1e-6)
    assert norms.control_variate(x_K, weight_sq, in_features).value == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 2), (1, 40), (30, 5), (12, 64), (64, 64)])
def test_exact_equals_100000_sampled_directions_within_their_error(out_features: int, in_features: int) -> None:
    weight_OI = matrix(out_features, in_features, 3)
    sampled = norms.gaussian(sq_norms(weight_OI, norms.directions(1, "sampled", 100_000, in_features)))
    found = norms.exact(weight_OI.T @ weight_OI, in_features)
    assert abs(found.value - sampled.value) < 4 * sampled.stderr
    assert sampled.stderr < 3e-3 * sampled.value
    # W W^T has the same non-zero spectrum
    assert norms.exact(weight_OI @ weight_OI.T, in_features).value == pytest.approx(found.value, rel=1e-9)


def test_exact_of_one_row_is_known_in_closed_form() -> None:
    # E |u_1| on the unit sphere of R^3 is 1/2.
    row = torch.tensor([[0.0, 5.0, 0.0]], dtype=torch.float64)
    assert norms.exact(row.T @ row, 3).value == pytest.approx(2.5, rel=1e-9)


def test_control_variate_is_measurably_better_than_gaussian_at_equal_k() -> None:
    errors: dict[str, list[float]] = {"gaussian": [], "control_variate": []}
    for seed in range(40):
        weight_OI = torch.exp(torch.randn(96, 1, generator=torch.Generator().manual_seed(seed))).double() * matrix(
            96, 128, seed
        ).div(10)
        weight_OI += torch.randn(96, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        truth = norms.exact(weight_OI @ weight_OI.T, 128).value
        x_K = sq_norms(weight_OI, norms.directions(seed, "w", 64, 128))
        sampled = norms.gaussian(x_K)
        controlled = norms.control_variate(x_K, float(weight_OI.square().sum()), 128)
        errors["gaussian"].append((sampled.value / truth - 1) ** 2)
        errors["control_variate"].append((controlled.value / truth - 1) ** 2)
        assert controlled.stderr < sampled.stderr
    rms = {name: (sum(squares) / len(squares)) ** 0.5 for name, squares in errors.items()}
    assert rms["control_variate"] < rms["gaussian"] / 3, rms


def test_closed_form_is_an_upper_bound() -> None:
    for seed in range(5):
        weight_OI = matrix(8, 32, seed)
        bound = norms.closed_form(float(weight_OI.square().sum()), 32).value
        assert norms.exact(weight_OI @ weight_OI.T, 32).value < bound


def test_directions_are_keyed_by_seed_and_path_alone() -> None:
    first = norms.directions(0, "layers.0.q_proj", 8, 16)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    norms.directions(0, "layers.1.q_proj", 8, 16)
    assert torch.equal(torch.random.get_rng_state(), state)  # the host's random state is left alone
    assert torch.equal(norms.directions(0, "layers.0.q_proj", 8, 16), first)
    assert not torch.equal(norms.directions(1, "layers.0.q_proj", 8, 16), first)
    assert not torch.equal(norms.directions(0, "layers.0.k_proj", 8, 16), first)
    assert (first.shape, first.dtype) == ((8, 16), torch.float32)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    # the same on every machine and in every later version
    digest = hashlib.sha256((first * 2**10).round().to(torch.int32).numpy().tobytes()).hexdigest()
    assert digest == "405dd23676d1ecd524b0be6385b0181408ec87f01709d0405bbf65fe547cd91d"


def test_directions_are_uniform() -> None:
    u_KI = norms.directions(0, "uniform", 50_000, 3).double()
    torch.testing.assert_close(u_KI.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(u_KI.T @ u_KI / 50_000, torch.eye(3, dtype=torch.float64) / 3, atol=0.01, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-15, 1.0, 1e15, 1e22])
@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (70, 333)])
def test_the_quick_sum_of_squares_is_near_the_one_in_float64_at_every_scale(
    scale: float, shape: tuple[int, int]
) -> None:
    weight_OI = (matrix(*shape, 7) * scale).float()
    weight_OI[0] *= 1e-6  # unequal rows
    truth = float(weight_OI.double().square().sum())
    assert float(norms.weight_sq_float32(weight_OI)) == pytest.approx(truth, rel=3e-7)
    weight_OI[-1, -1] = torch.nan
    assert not norms.weight_sq_float32(weight_OI).isfinite()
