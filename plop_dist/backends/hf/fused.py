"""How transformers' families lay out their fused linears (q, k, v in one; gate and up in one): whose rows are whose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from plop_dist.measure.blocks import Rows

Parts = list[tuple[str, Rows]]
_QKV = ("q_proj", "k_proj", "v_proj")


def parts_of(owner: nn.Module, name: str, num_rows: int) -> Parts | None:
    """Return the logical names and rows in the linear `name` of `owner`, or None where its layout is not known.

    num_rows: its out_features over all ranks. A fused linear of an unknown class is scored whole, under its own name.
    """
    layout = _LAYOUTS.get(name, {}).get(type(owner).__name__)
    return layout(owner, num_rows) if layout else None


def _stacked(names: Sequence[str], widths: Sequence[int]) -> Parts:
    """Return the parts that follow one another with these widths, over and over until all rows are taken."""
    stops = list(accumulate(widths))
    return [(name, Rows(stops[-1], stop - width, stop)) for name, width, stop in zip(names, widths, stops, strict=True)]


def _thirds(owner: Any, num_rows: int) -> Parts:
    return _stacked(_QKV, [num_rows // 3] * 3)


def _per_head(owner: Any, num_rows: int) -> Parts:
    """[q, k, v] of one head after another."""
    head_dim = getattr(owner, "head_size", None) or owner.head_dim
    return _stacked(_QKV, [head_dim] * 3)


def _grouped_query(owner: Any, num_rows: int) -> Parts:
    """All query heads, then all key heads, then all value heads."""
    kv_width = owner.num_key_value_heads * owner.head_dim
    return _stacked(_QKV, [num_rows - 2 * kv_width, kv_width, kv_width])


def _conv_attention(owner: Any, num_rows: int) -> Parts:
    """GPT-2: [q, k, v], or only [k, v] where it attends to an encoder."""
    names = _QKV if num_rows == 3 * owner.split_size else _QKV[1:]
    return _stacked(names, [owner.split_size] * len(names))


def _big_code(owner: Any, num_rows: int) -> Parts:
    if owner.is_cross_attention:
        return _stacked(_QKV[1:], [num_rows // 2] * 2)
    if owner.multi_query:
        return _stacked(_QKV, [owner.embed_dim, owner.kv_dim, owner.kv_dim])
    return _per_head(owner, num_rows)


def _falcon(owner: Any, num_rows: int) -> Parts:
    """[query heads, k, v] per key-value group (40B), over all heads (7B, multi-query), or per head (1B, 3B)."""
    if owner.new_decoder_architecture:
        return _stacked(_QKV, [owner.num_heads // owner.num_kv_heads * owner.head_dim, owner.head_dim, owner.head_dim])
    if owner.multi_query:
        return _stacked(_QKV, [owner.num_heads * owner.head_dim, owner.head_dim, owner.head_dim])
    return _per_head(owner, num_rows)


def _codegen(owner: Any, num_rows: int) -> Parts:
    """[q, v, k] in each of four blocks, the model-parallel ranks it was trained on."""
    return _stacked(("q_proj", "v_proj", "k_proj"), [num_rows // 12] * 3)


def _gate_up(owner: Any, num_rows: int) -> Parts:
    return _stacked(("gate_proj", "up_proj"), [num_rows // 2] * 2)


def _up_gate(owner: Any, num_rows: int) -> Parts:
    return _stacked(("up_proj", "gate_proj"), [num_rows // 2] * 2)


# Transformers 5: the linear's name -> its owner's class -> the parts.
_LAYOUTS: dict[str, dict[str, Callable[[Any, int], Parts]]] = {
    "query_key_value": {
        "GPTNeoXAttention": _per_head,
        "GPTNeoXJapaneseAttention": _per_head,
        "BloomAttention": _per_head,
        "PersimmonAttention": _per_head,
        "FalconAttention": _falcon,
        "FalconFlashAttention2": _falcon,
    },
    "qkv_proj": {
        "Phi3Attention": _grouped_query,
        "Phi4MultimodalAttention": _grouped_query,
        "MiniMaxLightningAttention": _per_head,
        "CodeGenAttention": _codegen,
    },
    "Wqkv": {"MptAttention": _thirds, "DbrxAttention": _grouped_query, "ModernBertAttention": _thirds},
    "c_attn": {
        "GPT2Attention": _conv_attention,
        "DecisionTransformerGPT2Attention": _conv_attention,
        "ImageGPTAttention": _conv_attention,
        "Attention": _conv_attention,  # the first GPT
        "GPTBigCodeAttention": _big_code,
    },
    "gate_up_proj": {
        **dict.fromkeys(
            ("Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP", "GlmImageTextMLP", "GlmOcrTextMLP",
             "DiaMLP", "Zamba2MLP", "MiniMaxM3VLDenseMLP"), _gate_up),
        "Phi4MultimodalAudioMLP": _up_gate,
    },
    "input_linear": dict.fromkeys(("GraniteMoeSharedMLP", "GraniteMoeHybridMLP"), _gate_up),
}  # fmt: skip
