"""The mathematics of one weight: per-token squared norms and the four estimates of b(W) = E||Wu||.

No framework, no process group: every function works on what it is given, and the caller sums over shards.
Source: design of PLoP, arXiv 2506.20629, section 3 (NFN); the control variate and the closed integral are ours.
"""

# T tokens, I in_features, O out_features, K directions

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_QUADRATURE_POINTS = 4000
_ROW_VALUES = 64
_PIECE_VALUES = 1 << 15  # per thread: 256 KiB in float64 stay in a core's cache


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


def weight_sq(weight_OI: Tensor) -> Tensor:
    """Return ||W||_F^2 of a block of a weight: (), float64, not finite exactly where an entry is not.

    weight_OI: (O, I), float32, any stride. Summed in float64, where squares of float32 neither overflow nor vanish.
    """
    if weight_OI.device.type != "cpu":
        return torch.linalg.vector_norm(weight_OI, dtype=torch.float64).square()
    # torch 2.13 sums the squares of a norm on the CPU either in float32 (off by 1e-3 on 16 million entries) or, asked
    # for float64, at a twentieth of the memory's speed.
    dots = [torch.dot(values, values) for values in _double_pieces(weight_OI.reshape(-1))]
    return torch.stack(dots).sum()


def weight_sq_float32(weight_OI: Tensor) -> Tensor:
    """Return ||W||_F^2 like weight_sq, in a quarter of its time, to the precision of products in float32."""
    if weight_OI.device.type != "cpu":
        return weight_sq(weight_OI)
    values = weight_OI.reshape(-1)
    whole = len(values) // _ROW_VALUES * _ROW_VALUES
    # Rows this short lose nothing to speak of in float32, and their sums are added in float64.
    total = torch.linalg.vector_norm(values[:whole].view(-1, _ROW_VALUES), dim=1).double().square().sum()
    total += values[whole:].double().square().sum()
    # A square below 1e-38, which float32 loses, is then nothing beside the total; one above 1e38 makes it infinite.
    return total if 1e-25 * len(values) < float(total) < math.inf else weight_sq(weight_OI)


def column_sq(wu_OK: Tensor) -> Tensor:
    """Return the squared norms of the columns, (K,), float64, of products with directions: (O, K), a floating dtype."""
    if wu_OK.device.type != "cpu":
        return wu_OK.double().square().sum(dim=0)
    x_K = torch.zeros(wu_OK.shape[1], dtype=torch.float64)
    for piece_oK in _double_pieces(wu_OK):
        x_K += piece_oK.square_().sum(dim=0)
    return x_K


def column_sq_float32(wu_OK: Tensor) -> Tensor:
    """Return the squared norms of the columns like column_sq, in half of its time, to float32's precision."""
    if wu_OK.device.type != "cpu" or wu_OK.dtype != torch.float32:
        return column_sq(wu_OK)
    sq_OK = wu_OK.square()
    whole = len(sq_OK) // _ROW_VALUES * _ROW_VALUES
    x_K = sq_OK[:whole].view(-1, _ROW_VALUES, sq_OK.shape[1]).sum(dim=1).sum(dim=0, dtype=torch.float64)
    x_K += sq_OK[whole:].sum(dim=0, dtype=torch.float64)
    # As in weight_sq_float32: what float32 lost below 1e-38 is nothing beside this, and nothing has overflowed.
    least, most = x_K.aminmax()
    return x_K if 1e-25 * len(sq_OK) < float(least) and float(most) < math.inf else column_sq(wu_OK)


def _double_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix, or the entries of a vector, in turn as float64, always in the same memory."""
    per_row = tensor[0].numel() if tensor.dim() > 1 else 1
    length = min(len(tensor), max(1, _PIECE_VALUES * torch.get_num_threads() // per_row))
    # Fresh memory for each would cost more than the arithmetic: what malloc maps anew comes in page by page.
    buffer = torch.empty(length, *tensor.shape[1:], dtype=torch.float64)
    for piece in tensor.split(length):
        yield (buffer if len(piece) == length else buffer[: len(piece)]).copy_(piece)


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
    return u_KI.div_(torch.linalg.vector_norm(u_KI, dim=1, keepdim=True))


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
