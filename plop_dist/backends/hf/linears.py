"""Which linear maps a Hugging Face model holds in its modules, under logical names.

Everything is read from module attributes, never from parameter shapes, so that it also holds on the meta device, under
ZeRO-3's zero.Init (where a released weight has shape (0,)) and under transformers' tensor parallelism.

Types are last path components, the field's convention, so GPT-2's `c_proj` stands for both its attention and its MLP
output, exactly as PEFT's `target_modules=["c_proj"]` adapts both. Exceptions are the model's output head, which is
always of type `lm_head`, whatever the family calls it (GPT-NeoX: `embed_out`), and what rests on other tokens: a vision
tower's types are its own (`vision.q_proj`), and so are those of encoder, decoder and the attention between them.
"""

# T tokens, I in_features, O out_features

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from plop_dist.backends.hf.fused import parts_of
from plop_dist.backends.hf.own_modules import adapters_around, named_modules, parameter_shape
from plop_dist.backends.hf.parts import part_finder, stream_finder
from plop_dist.backends.hf.quantized.readers import add_readers
from plop_dist.backends.hf.roles import Roles
from plop_dist.errors import ModelError
from plop_dist.measure.blocks import Block, Rows
from plop_dist.measure.weight import (
    PlainReader,
    Stored,
    Weight,
    add_reader,
    is_dense,
    is_packed,
    is_readable,
    readable_methods,
)
from plop_dist.values.names import layer_index, module_type
from plop_dist.values.scores import ModelPart, Projection, Role, Storage


@dataclass(frozen=True)
class LinearModule:
    """A module computing y = W z (+ bias), and the logical projections that its output rows belong to.

    is_transposed: the weight is stored as (I, O), as in Conv1D. adapter: what PEFT has put around the module.
    """

    path: str
    module: nn.Module
    blocks: tuple[Block, ...]
    is_transposed: bool = False
    adapter: nn.Module | None = None


def find_linears(model: nn.Module) -> list[LinearModule]:
    """Return every linear module of the model in definition order, each once; the output head too, embeddings not.

    Routers too, which transformers keeps as a bare parameter. Experts kept as 3-D parameters: see experts.
    Raises ModelError if weights are quantised in a way that nothing here can read. Adapters of PEFT's are passed over.
    """
    modules = named_modules(model)
    head = _output_head(model)
    roles = Roles(modules)
    found = []
    for path, module in modules.items():
        _refuse(path, module)
        if isinstance(module, nn.Linear):
            sizes = (module.in_features, module.out_features)
            own_storage = "router" if type(module).__name__.endswith("Router") else "linear"
        elif isinstance(module, Conv1D):
            sizes, own_storage = (module.nx, module.nf), "conv1d"
        elif _is_quantised_linear(module):
            sizes, own_storage = _sizes(module), "linear"
        elif _is_router(module):
            found.append(_router(path, module))
            continue
        else:
            continue
        if not all(sizes):
            continue
        role = roles.role_of(path, sizes[1])
        owner_path, _, name = path.rpartition(".")
        parts = parts_of(modules[owner_path], name, sizes[1])
        if parts is None:
            whole = projection_of(path, *sizes, own_storage, type_name="lm_head" if module is head else None, role=role)
            blocks: tuple[Block, ...] = (Block(whole),)
        else:
            blocks = tuple(_block(owner_path, part, rows, sizes, path, role) for part, rows in parts)
        found.append(LinearModule(path, module, blocks, is_transposed=own_storage == "conv1d"))
    part_of, stream_of, around = part_finder(model), stream_finder(model), adapters_around(model)
    return [
        replace(_with_part(linear, part_of(linear.path), stream_of(linear.path)), adapter=around.get(linear.path))
        for linear in found
    ]


def _with_part(linear: LinearModule, part: ModelPart, stream: str | None) -> LinearModule:
    """Return the linear as one of this part and stream, in which types are other types than elsewhere of that name."""
    prefix = stream if part == "language" else part
    if prefix is None:
        return linear
    blocks = []
    for block in linear.blocks:
        own = {"part": part, "type": f"{prefix}.{block.projection.type}"}
        blocks.append(replace(block, projection=block.projection.model_copy(update=own)))
    return replace(linear, blocks=tuple(blocks))


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is one that find_linears returns."""
    return isinstance(module, nn.Linear | Conv1D) or _is_router(module) or _is_quantised_linear(module)


def projection_of(
    fqn: str,
    in_features: int,
    out_features: int,
    storage: Storage,
    stored_in: str | None = None,
    *,
    type_name: str | None = None,
    role: Role | None = None,
) -> Projection:
    """Return the projection of a path, with global sizes; its type is the last component, or type_name."""
    return Projection(
        fqn=fqn,
        type=type_name or module_type(fqn),
        layer=layer_index(fqn),
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        stored_in=stored_in,
        role=role,
    )


# Routers of transformers' experts: a bare (E, I) weight; each of them returns its raw logits, alone or first.
_ROUTER = re.compile(r"(Top[kK]|Hash)Router$")


def _is_router(module: nn.Module) -> bool:
    return bool(_ROUTER.search(type(module).__name__)) and isinstance(getattr(module, "weight", None), nn.Parameter)


def _sizes(module: Any) -> tuple[int, int]:
    return (module.in_features, module.out_features)


def _is_quantised_linear(module: Any) -> bool:
    """Tell whether a module that is no nn.Linear stands for one, as some quantisers' do."""
    stored = Stored(module)
    is_sized = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return is_sized and is_readable(stored) and not is_dense(stored)


def _block(owner_path: str, name: str, rows: Rows, sizes: tuple[int, int], stored_in: str, role: Role | None) -> Block:
    num_rows = sizes[1] // rows.period * rows.width
    return Block(projection_of(f"{owner_path}.{name}", sizes[0], num_rows, "fused", stored_in, role=role), rows)


def _router(path: str, module: Any) -> LinearModule:
    """A bare parameter, not a linear module, so that PEFT can only reach it as a parameter.

    Not even so where others read more of the module (DeepSeek-V3's e_score_correction_bias) than PEFT's wrapper shows.
    """
    num_experts, hidden_size = parameter_shape(module.weight)
    tensors = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    if tensors <= {"weight", "bias"}:
        projection = projection_of(path, hidden_size, num_experts, "expert_parameter", f"{path}.weight", role="router")
    else:
        projection = projection_of(path, hidden_size, num_experts, "router", role="router")
    return LinearModule(path, module, (Block(projection),))


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings else None


def _refuse(path: str, module: nn.Module) -> None:
    """Raise ModelError for modules whose linear map is not one plain weight."""
    if (is_linear(module) or is_packed(module)) and not is_readable(Stored(module)):
        kind = f"{type(module).__name__}, weight {getattr(getattr(module, 'weight', None), 'dtype', None)}"
        raise ModelError(
            f"Module '{path}' holds quantised weights ({kind}), whose norms cannot be read; load the model in float32, "
            f"bfloat16 or float16, or quantised by {', '.join(readable_methods())}."
        )


class _Conv1DReader(PlainReader):
    """transformers' Conv1D, which keeps its weight as (I, O)."""

    def knows(self, stored: Stored) -> bool:
        return isinstance(stored.module, Conv1D) and super().knows(stored)

    def read(self, stored: Stored) -> Weight:
        return super().read(replace(stored, is_transposed=True))


add_reader(_Conv1DReader())
add_readers()
