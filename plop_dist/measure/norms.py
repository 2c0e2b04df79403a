"""The mathematics of one weight: per-token squared norms and the four estimates of b(W) = E||Wu||.

No framework, no process group: every function works on what it is given, and the caller sums over shards.
Source: design of PLoP, arXiv 2506.20629, section 3 (NFN); the control variate and the closed integral are ours.
"""

# T tokens, I in_features, O out_features, K directions

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_QUADRATURE_POINTS = 4000


@dataclass(frozen=True)
class Baseline:
    """An estimate of b(W) = E||Wu||, u uniform on the unit sphere, and its standard error (0: not sampled)."""

    value: float
    stderr: float


def local_sq_norm(y_TO: Tensor) -> Tensor:
    """Return the squared Euclidean norm of each token's local features.

    y_TO: (..., O_local), any float dtype and stride. Returns (T,), float32, T the product of the leading sizes.
    Additive over a feature-sharded axis: sum the shards first, take the root after.
    """
    dtype = torch.promote_types(y_TO.dtype, torch.float32)
    return torch.linalg.vector_norm(y_TO, dim=-1, dtype=dtype).square_().float().reshape(-1)


def gains(in_sq_T: Tensor, out_sq_T: Tensor) -> Tensor:
    """Return ||W z_t|| / ||z_t|| per token from whole squared norms; not finite where ||z_t|| is 0 or not finite.

    in_sq_T, out_sq_T: same shape, float32, already summed over the feature group.
    """
    return torch.sqrt(out_sq_T / in_sq_T)


def directions(seed: int, fqn: str, num_directions: int, in_features: int) -> Tensor:
    """Return K seeded directions, uniform on the unit sphere: (K, I), float32, on the CPU.

    Keyed by (seed, fqn) alone, so that every rank of every layout draws the same ones.
    """
    key = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    u_KI = torch.randn(num_directions, in_features, generator=generator, dtype=torch.float32)
    return u_KI / torch.linalg.vector_norm(u_KI, dim=1, keepdim=True)


def gaussian(x_K: Tensor) -> Baseline:
    """Return the paper's plain sampling, mean_k ||W u_k||. x_K: ||W u_k||^2, (K,)."""
    norms_K = x_K.double().sqrt()
    return Baseline(float(norms_K.mean()), float(norms_K.std() / math.sqrt(len(norms_K))))


def control_variate(x_K: Tensor, weight_sq: float, in_features: int) -> Baseline:
    """Return sampling with the exactly known mean of X = ||W u||^2 as control variate.

    x_K: ||W u_k||^2, (K,); weight_sq: ||W||_F^2. With mu = weight_sq / in_features = E X,
    b = sqrt(mu) + mean_k(sqrt(X_k) - sqrt(mu) - (X_k - mu) / (2 sqrt(mu))): the linear part of the root has mean
    zero and is removed, so only the curvature is sampled. Unbiased.
    """
    mu = weight_sq / in_features
    root = math.sqrt(mu)
    x_K = x_K.double()
    rest_K = x_K.sqrt() - root - (x_K - mu) / (2 * root)
    return Baseline(root + float(rest_K.mean()), float(rest_K.std() / math.sqrt(len(rest_K))))


def closed_form(weight_sq: float, in_features: int) -> Baseline:
    """Return sqrt(E ||Wu||^2) = ||W||_F / sqrt(in_features): an upper bound of b, close when W has many directions."""
    return Baseline(math.sqrt(weight_sq / in_features), 0.0)


def exact(gram: Tensor, in_features: int) -> Baseline:
    """Return b(W) by quadrature of its integral over the spectrum of W^T W.

    gram: W^T W or W W^T (they share the non-zero eigenvalues l_i), float64. With n = in_features and g standard
    normal in R^n, ||W g|| = ||g|| ||W u|| with independent factors, hence
    b = [1 / (2 sqrt(pi)) * int_0^inf (1 - prod_i (1 + 2 l_i t)^(-1/2)) t^(-3/2) dt] / (sqrt(2) G((n+1)/2) / G(n/2)).
    """
    l_I = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    scale = float(l_I.sum())
    # t = e^s / scale: the integrand then decays exponentially on both sides (as e^(s/2) and e^(-s/2)), where the
    # trapezoidal rule converges exponentially; what lies beyond +-70 is below 1e-15.
    s_P = torch.linspace(-70, 70, _QUADRATURE_POINTS, dtype=torch.float64)
    log_product_P = torch.empty_like(s_P)
    for start in range(0, len(s_P), 256):
        t_P = s_P[start : start + 256].exp() / scale
        log_product_P[start : start + 256] = -0.5 * torch.log1p(2 * t_P[:, None] * l_I).sum(dim=1)
    integrand_P = -torch.expm1(log_product_P) * torch.exp(-s_P / 2) * math.sqrt(scale)
    mean_norm_of_gaussian = float(torch.trapezoid(integrand_P, s_P)) / (2 * math.sqrt(math.pi))
    radius = math.sqrt(2) * math.exp(math.lgamma((in_features + 1) / 2) - math.lgamma(in_features / 2))
    return Baseline(mean_norm_of_gaussian / radius, 0.0)
