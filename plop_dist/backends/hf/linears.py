"""Which linear maps a Hugging Face model holds in its modules, under logical names, and whose output rows are whose.

Everything is read from module attributes, never from parameter shapes, so that it also holds on the meta device, under
ZeRO-3's zero.Init (where a released weight has shape (0,)) and under transformers' tensor parallelism.

Types are last path components, the field's convention, so GPT-2's `c_proj` stands for both its attention and its MLP
output, exactly as PEFT's `target_modules=["c_proj"]` adapts both. The one exception is the model's output head, which
is always of type `lm_head`, whatever the family calls it (GPT-NeoX: `embed_out`).
"""

# T tokens, I in_features, O out_features

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plop_dist.errors import ModelError
from plop_dist.values.names import layer_index, module_type, unwrapped
from plop_dist.values.scores import Projection, Storage


@dataclass(frozen=True)
class Rows:
    """The output features r of a fused linear with start <= r % period < stop.

    One period of all the rows is a plain contiguous block; shorter periods are layouts interleaved per attention head
    or per key-value group.
    """

    period: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many rows of each period are taken."""
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """One logical projection inside a module's output; `rows` None means that it owns all of it.

    projection: with the global sizes.
    """

    projection: Projection
    rows: Rows | None = None

    def take(self, y_TO: Tensor) -> Tensor:
        """Return this projection's output features of y, (..., O_block); a view where they are contiguous.

        y_TO: (..., O), the module's output, or its bias (O,); O may be a shard of whole periods.
        """
        return y_TO if self.rows is None else _take(y_TO, self.rows, y_TO.dim() - 1)

    def take_rows(self, weight_OI: Tensor) -> Tensor:
        """Return this projection's weight, (O_block, I), from the module's (O, I); a view where rows are contiguous.

        A Conv1D's weight is (I, O): pass its transpose.
        """
        return weight_OI if self.rows is None else _take(weight_OI, self.rows, 0)


@dataclass(frozen=True)
class LinearModule:
    """A module computing y = W z (+ bias), and the logical projections that its output rows belong to.

    is_transposed: the weight is stored as (I, O), as in Conv1D.
    """

    path: str
    module: nn.Module
    blocks: tuple[Block, ...]
    is_transposed: bool = False


def find_linears(model: nn.Module) -> list[LinearModule]:
    """Return every linear module of the model in definition order, each once; the output head too, embeddings not.

    Routers too, which transformers keeps as a bare parameter. Experts kept as 3-D parameters: see hf_experts.
    Raises ModelError if weights are quantised or the model already carries PEFT adapters.
    """
    modules = named_modules(model)
    head = _output_head(model)
    found = []
    for path, module in modules.items():
        _refuse(path, module)
        if isinstance(module, nn.Linear):
            sizes = (module.in_features, module.out_features)
            own_storage = "router" if type(module).__name__.endswith("Router") else "linear"
        elif isinstance(module, Conv1D):
            sizes, own_storage = (module.nx, module.nf), "conv1d"
        elif _ROUTER.search(type(module).__name__) and isinstance(getattr(module, "weight", None), nn.Parameter):
            found.append(_router(path, module))
            continue
        else:
            continue
        owner_path, _, name = path.rpartition(".")
        parts = _split(modules[owner_path], name, sizes[1])
        if parts is None:
            whole = _projection(path, sizes, own_storage, None, "lm_head" if module is head else None)
            blocks: tuple[Block, ...] = (Block(whole),)
        else:
            blocks = tuple(_block(owner_path, part, rows, sizes, path) for part, rows in parts)
        found.append(LinearModule(path, module, blocks, is_transposed=own_storage == "conv1d"))
    return found


# How each family's modeling code lays out its fused linears (transformers 5): linear's name -> its owner's class ->
# the parts. A fused linear of an unknown class is scored whole, under its own name.

_Parts = list[tuple[str, Rows]]
_QKV = ("q_proj", "k_proj", "v_proj")


def _stacked(names: Sequence[str], widths: Sequence[int]) -> _Parts:
    """Return the parts that follow one another with these widths, over and over until all rows are taken."""
    stops = list(accumulate(widths))
    return [(name, Rows(stops[-1], stop - width, stop)) for name, width, stop in zip(names, widths, stops, strict=True)]


def _thirds(owner: Any, num_rows: int) -> _Parts:
    return _stacked(_QKV, [num_rows // 3] * 3)


def _per_head(owner: Any, num_rows: int) -> _Parts:
    """[q, k, v] of one head after another."""
    head_dim = getattr(owner, "head_size", None) or owner.head_dim
    return _stacked(_QKV, [head_dim] * 3)


def _grouped_query(owner: Any, num_rows: int) -> _Parts:
    """All query heads, then all key heads, then all value heads."""
    kv_width = owner.num_key_value_heads * owner.head_dim
    return _stacked(_QKV, [num_rows - 2 * kv_width, kv_width, kv_width])


def _conv_attention(owner: Any, num_rows: int) -> _Parts:
    """GPT-2: [q, k, v], or only [k, v] where it attends to an encoder."""
    names = _QKV if num_rows == 3 * owner.split_size else _QKV[1:]
    return _stacked(names, [owner.split_size] * len(names))


def _big_code(owner: Any, num_rows: int) -> _Parts:
    if owner.is_cross_attention:
        return _stacked(_QKV[1:], [num_rows // 2] * 2)
    if owner.multi_query:
        return _stacked(_QKV, [owner.embed_dim, owner.kv_dim, owner.kv_dim])
    return _per_head(owner, num_rows)


def _falcon(owner: Any, num_rows: int) -> _Parts:
    """[query heads, k, v] per key-value group (40B), over all heads (7B, multi-query), or per head (1B, 3B)."""
    if owner.new_decoder_architecture:
        return _stacked(_QKV, [owner.num_heads // owner.num_kv_heads * owner.head_dim, owner.head_dim, owner.head_dim])
    if owner.multi_query:
        return _stacked(_QKV, [owner.num_heads * owner.head_dim, owner.head_dim, owner.head_dim])
    return _per_head(owner, num_rows)


def _codegen(owner: Any, num_rows: int) -> _Parts:
    """[q, v, k] in each of four blocks, the model-parallel ranks it was trained on."""
    return _stacked(("q_proj", "v_proj", "k_proj"), [num_rows // 12] * 3)


def _gate_up(owner: Any, num_rows: int) -> _Parts:
    return _stacked(("gate_proj", "up_proj"), [num_rows // 2] * 2)


def _up_gate(owner: Any, num_rows: int) -> _Parts:
    return _stacked(("up_proj", "gate_proj"), [num_rows // 2] * 2)


_LAYOUTS: dict[str, dict[str, Callable[[Any, int], _Parts]]] = {
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


# Routers of transformers' experts: a bare (E, I) weight; each of them returns its raw logits, alone or first.
_ROUTER = re.compile(r"(Top[kK]|Hash)Router$")


def _split(owner: nn.Module, name: str, num_rows: int) -> _Parts | None:
    layout = _LAYOUTS.get(name, {}).get(type(owner).__name__)
    return layout(owner, num_rows) if layout else None


def _take(tensor: Tensor, rows: Rows, dim: int) -> Tensor:
    if tensor.shape[dim] == rows.period:
        return tensor.narrow(dim, rows.start, rows.width)
    periods = tensor.unflatten(dim, (-1, rows.period))
    return periods.narrow(dim + 1, rows.start, rows.width).flatten(dim, dim + 1)


def _block(owner_path: str, name: str, rows: Rows, sizes: tuple[int, int], stored_in: str) -> Block:
    num_rows = sizes[1] // rows.period * rows.width
    return Block(_projection(f"{owner_path}.{name}", (sizes[0], num_rows), "fused", stored_in), rows)


def _projection(
    fqn: str, sizes: tuple[int, int], storage: Storage, stored_in: str | None, type_: str | None = None
) -> Projection:
    return Projection(
        fqn=fqn,
        type=type_ or module_type(fqn),
        layer=layer_index(fqn),
        in_features=sizes[0],
        out_features=sizes[1],
        storage=storage,
        stored_in=stored_in,
    )


def _router(path: str, module: Any) -> LinearModule:
    """A bare parameter, not a linear module, so that PEFT can only reach it as a parameter.

    Not even so where others read more of the module (DeepSeek-V3's e_score_correction_bias) than PEFT's wrapper shows.
    """
    num_experts, hidden_size = parameter_shape(module.weight)
    tensors = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    if tensors <= {"weight", "bias"}:
        projection = _projection(path, (hidden_size, num_experts), "expert_parameter", f"{path}.weight")
    else:
        projection = _projection(path, (hidden_size, num_experts), "router", None)
    return LinearModule(path, module, (Block(projection),))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its path in the model as it was before it was compiled or checkpointed."""
    return {unwrapped(path): module for path, module in model.named_modules()}


def parameter_shape(parameter: Any) -> tuple[int, ...]:
    """Return a parameter's global shape, also where ZeRO-3 has released it and its own shape is (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings else None


def _refuse(path: str, module: nn.Module) -> None:
    """Raise ModelError for modules whose linear map is not one plain weight."""
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        raise ModelError(
            f"Module '{path}' already carries a PEFT adapter; score the base model: call merge_and_unload() or "
            "unload() on the PEFT model first."
        )
    weight = getattr(module, "weight", None)
    is_library = any(cls.__module__.split(".")[0] in _QUANTISERS for cls in type(module).__mro__)
    is_packed = hasattr(module, "qweight")
    is_narrow = isinstance(module, nn.Linear) and weight is not None and not is_plain(weight)
    if is_library or is_packed or is_narrow:
        kind = f"{type(module).__name__}, weight {getattr(weight, 'dtype', None)}"
        raise ModelError(
            f"Module '{path}' holds quantised weights ({kind}), whose norms cannot be read; load the model in float32, "
            "bfloat16 or float16, without a quantization_config."
        )


_QUANTISERS = ("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "aqlm", "eetq", "quanto")


def is_plain(weight: Tensor) -> bool:
    """Tell whether a weight holds its own values: floating point of at least 16 bits, neither packed nor scaled."""
    return weight.is_floating_point() and weight.element_size() >= 2
