"""The forward passes of Transformer Engine's modules in torch functions: what their kernels compute, nothing faster."""

# s, b, h, d sequence, batch, heads, features of a head; n, m queries and keys

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_AnyTensor = Tensor | None


def patch() -> None:
    """Have the imported package's modules run on the CPU."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.attention.dot_product_attention import (  # pyright: ignore[reportMissingImports]
        dot_product_attention as attention,
    )
    from transformer_engine.pytorch.module import base  # pyright: ignore[reportMissingImports]

    # Constructors insist on a GPU.
    base.torch = _Instead(torch, cuda=_Instead(torch.cuda, is_available=lambda: True))
    makers = {name: _on_cpu(getattr(torch, name)) for name in ("zeros", "empty", "ones")}
    attention.torch = _Instead(torch, **makers)
    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _layernorm_linear
    te.GroupedLinear.forward = _grouped
    te.RMSNorm.forward = lambda self, x, *_, **__: _norm(self, x, self.weight, None, "RMSNorm")
    te.LayerNorm.forward = lambda self, x, *_, **__: _norm(self, x, self.weight, self.bias, "LayerNorm")
    te.DotProductAttention.forward = _attention


class _Instead:
    """A module as one of Transformer Engine's sees it, with some names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, key: str) -> Any:
        return getattr(self._module, key)


def _on_cpu(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **{**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs)

    return made


def _multiply(x: Tensor, weight: Tensor, bias: _AnyTensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(self: Any, x: Tensor, weight: Tensor, bias: _AnyTensor, kind: str) -> Tensor:
    gain, z = weight.float() + (1 if self.zero_centered_gamma else 0), x.float()
    if kind == "RMSNorm":
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps) * gain).to(x.dtype)
    centred = z - z.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps) * gain
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _parallel(self: Any, x: Tensor) -> tuple[Tensor, _AnyTensor]:
    """Return the output of a column- or row-parallel linear, or of a whole one, and its bias, added or not."""
    from megatron.core.tensor_parallel import mappings

    bias = self.bias if self.use_bias else None
    is_parallel = self.tp_size > 1 and self.tp_group is not None
    adds = bias is not None and not self.return_bias
    if self.parallel_mode == "row":
        y = _multiply(x, self.weight, None)
        if is_parallel and self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        elif is_parallel:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        return (y + bias.to(y.dtype) if adds else y), bias
    if self.parallel_mode == "column" and is_parallel and self.sequence_parallel:
        x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
    elif self.parallel_mode == "column" and is_parallel:
        x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
    return _multiply(x, self.weight, bias if adds else None), bias


def _linear(self: Any, inp: Tensor, *_: Any, **__: Any) -> Any:
    y, bias = _parallel(self, inp)
    return (y, bias) if self.return_bias else y


def _layernorm_linear(self: Any, inp: Tensor, *_: Any, **__: Any) -> Any:
    from megatron.core.tensor_parallel import mappings

    z = _norm(self, inp, self.layer_norm_weight, self.layer_norm_bias, self.normalization)
    gathers = getattr(self, "return_layernorm_output_gathered", False) and self.return_layernorm_output
    if gathers and self.sequence_parallel and self.tp_size > 1:
        z = mappings.gather_from_sequence_parallel_region(z, group=self.tp_group)
        bias = self.bias if self.use_bias else None
        y = _multiply(z, self.weight, None if self.return_bias else bias)
        z = z.detach()  # its backward adds no gradient of this one
    else:
        y, bias = _parallel(self, z)
    out = (y, bias) if self.return_bias else y
    if self.return_layernorm_output:
        return (*out, z) if isinstance(out, tuple) else (out, z)
    return out


def _grouped(self: Any, inp: Tensor, m_splits: Any, *_: Any, **__: Any) -> Any:
    sizes = [int(size) for size in m_splits]
    biases = [getattr(self, f"bias{slot}") if self.use_bias else None for slot in range(self.num_gemms)]
    outs = []
    for slot, (x, bias) in enumerate(zip(inp.split(sizes), biases, strict=True)):
        outs.append(_multiply(x, getattr(self, f"weight{slot}"), None if self.return_bias else bias))
    out = torch.cat(outs)
    return (out, biases) if self.return_bias else out


def _attention(
    self: Any, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: _AnyTensor = None,
    qkv_format: str | None = None, attn_mask_type: str | None = None, window_size: Any = None,
    core_attention_bias_type: str = "no_bias", core_attention_bias: _AnyTensor = None, **_: Any,
) -> Tensor:  # fmt: skip
    assert (qkv_format or self.qkv_format) == "sbhd"
    q, k, v = (t.permute(1, 2, 0, 3).float() for t in (query_layer, key_layer, value_layer))  # b h s d
    repeat = q.shape[1] // k.shape[1]
    places, keys = torch.arange(q.shape[2]) + (k.shape[2] - q.shape[2]), torch.arange(k.shape[2])
    if self.cp_group is not None and self.cp_group.size() > 1:
        k, v = (_gathered(self.cp_group, t) for t in (k, v))
        places, keys = (_gathered_places(self.cp_group, q.shape[2], part) for part in ("own", "all"))
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * self.softmax_scale
    kind = attn_mask_type or self.attn_mask_type
    window = window_size if window_size is not None else self.window_size
    hidden = _hidden(places, keys, "causal" in kind, window)
    if kind in ("arbitrary", "padding") and attention_mask is not None:
        hidden = hidden | attention_mask
    if core_attention_bias is not None and core_attention_bias_type == "post_scale_bias":
        scores = scores + core_attention_bias
    shares = _shares(self, scores.masked_fill(hidden, float("-inf")))
    out = (shares @ v).permute(2, 0, 1, 3)
    return out.reshape(*out.shape[:2], -1).to(query_layer.dtype)


def _gathered(group: Any, t_bhsd: Tensor) -> Tensor:
    """Return the keys or values of all ranks of a context-parallel group, one rank's after another's. No gradient."""
    parts = [torch.empty_like(t_bhsd, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, t_bhsd.contiguous(), group=group)
    return torch.cat(parts, 2)


def _gathered_places(group: Any, num_own: int, part: str) -> Tensor:
    """Return the places of this rank's tokens, or of all in the order of _gathered.

    Megatron cuts a row into two chunks for each rank: the first rank has the first and the last, and so on.
    """
    size = group.size()
    chunks = torch.arange(num_own * size).chunk(2 * size)
    ranks = [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(size)]
    return ranks[group.rank()] if part == "own" else torch.cat(ranks)


def _hidden(places: Tensor, keys: Tensor, is_causal: bool, window: Any) -> Tensor:
    """Return which keys no query may see, (n, m), by their places in the row, (n,) and (m,).

    window: how far to the left and to the right, -1: all.
    """
    places, keys = places[:, None], keys[None]
    hidden = (keys > places) if is_causal else torch.zeros(len(places), keys.shape[1], dtype=torch.bool)
    left, right = window if window is not None else (-1, -1)
    if left >= 0:
        hidden = hidden | (keys < places - left)
    return hidden | (keys > places + right) if right >= 0 else hidden


def _shares(self: Any, scores: Tensor) -> Tensor:
    if getattr(self, "softmax_type", "vanilla") == "vanilla":
        return scores.softmax(-1)
    # Attention sinks: one more logit per head, whose share goes nowhere.
    offset = self.softmax_offset if self.softmax_offset is not None else torch.zeros(scores.shape[1])
    sinks = offset.view(1, -1, 1, 1).float().expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
