"""Stand-ins for the kernel packages of state-space and linear-attention layers (mamba_ssm, fla), in torch."""

# b, s, h, d batch, sequence, heads, features of a head; p, n features and states of a state-space head

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def install() -> None:
    """Put the stand-ins where Megatron imports the kernels from, where these are absent."""
    places: dict[str, dict[str, Any]] = {
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": _GatedRMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_split_conv1d_scan_combined": _scan, "mamba_chunk_scan_combined": _not_here,
        },
        "fla.modules.convolution": {"causal_conv1d": lambda x, weight=None, bias=None, activation=None, **_: (
            _convolve(x, weight, bias, activation), None)},
        "fla.modules.l2norm": {"l2norm": _l2norm},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": _gated_delta_rule},
    }  # fmt: skip
    absent = {package for package in ("mamba_ssm", "fla") if find_spec(package) is None}
    for place, names in places.items():
        if place.split(".")[0] in absent:
            vars(_made(place)).update(names)


def _made(place: str) -> types.ModuleType:
    """Return the module of that name in sys.modules, made with its parents where it is not there."""
    if place not in sys.modules:
        module: Any = types.ModuleType(place)
        module.__spec__, module.__path__, module.__version__ = ModuleSpec(place, None, is_package=True), [], "0.0.0"
        sys.modules[place] = module
        parent, _, leaf = place.rpartition(".")
        if parent:
            setattr(_made(parent), leaf, module)
    return sys.modules[place]


def _convolve(x: Tensor, weight: Any, bias: Any, activation: str | None) -> Tensor:
    """Return the causal convolution of every channel. x: (b, s, d); weight: (d, w)."""
    padded = functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    y = functional.conv1d(padded, weight[:, None].to(x.dtype), bias, groups=weight.shape[0]).transpose(1, 2)
    return functional.silu(y) if activation in ("silu", "swish") else y


def _scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, chunk_size: int,
    seq_idx: Any = None, activation: str = "silu", headdim: int | None = None, ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    assert seq_idx is None, "packed sequences are not carried out here"
    b, s, width = zxbcdt.shape
    heads, p = A.shape[0], headdim or D.shape[-1]
    inner = heads * p
    n = (width - 2 * inner - heads) // (2 * ngroups)
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * ngroups * n, heads], -1)
    convolved = _convolve(xBC, conv1d_weight, conv1d_bias, activation).float()
    x, B, C = convolved.split([inner, ngroups * n, ngroups * n], -1)
    x, dt = x.view(b, s, heads, p), functional.softplus(dt.float() + dt_bias)
    B, C = (t.reshape(b, s, ngroups, n).repeat_interleave(heads // ngroups, 2) for t in (B, C))
    state, found = x.new_zeros(b, heads, p, n), []
    for t in range(s):
        entering = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + entering
        found.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(found, 1) + x * (D if D.dim() == 2 else D[:, None]).float()
    return (y.reshape(b, s, inner) * functional.silu(z.float())).to(zxbcdt.dtype)


def _not_here(*_: Any, **__: Any) -> None:
    raise RuntimeError("only the path of training and scoring is carried out here: mamba_split_conv1d_scan_combined")


class _GatedRMSNorm(torch.nn.Module):
    """Norms groups of features, before or after they are multiplied by silu(z)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias, self.eps = None, eps
        self.group_size, self.norm_before_gate = group_size or hidden_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        y = x.float()
        if z is not None and not self.norm_before_gate:
            y = y * functional.silu(z.float())
        parts = y.unflatten(-1, (-1, self.group_size))
        y = (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight.float()
        if z is not None and self.norm_before_gate:
            y = y * functional.silu(z.float())
        return y.to(x.dtype)


def _l2norm(x: Tensor, eps: float = 1e-6, **_: Any) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    assert cu_seqlens is None, "packed sequences are not carried out here"
    dtype = q.dtype
    if use_qk_l2norm_in_kernel:
        q, k = _l2norm(q), _l2norm(k)
    q, k, v, g, beta = (t.float() for t in (q, k, v, g, beta))  # (b, s, h, d), (b, s, h)
    state, found = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        missing = v[:, t] - (state * k[:, t, ..., None]).sum(-2)
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * missing)[..., None, :]
        found.append((state * q[:, t, ..., None]).sum(-2))
    return (torch.stack(found, 1) * (scale or q.shape[-1] ** -0.5)).to(dtype), None
