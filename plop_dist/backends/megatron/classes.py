"""Which classes of Megatron's are linears, and what they do besides W z: known by class, or refused by name."""

from __future__ import annotations

from torch import nn

from plop_dist.errors import ModelError

# Their forward is W z, with the norm before it that they carry as layer_norm_weight and the bias that they carry: see
# sites. By name, so that Transformer Engine need not be importable.
_KINDS = {
    "ColumnParallelLinear": "column",
    "TEColumnParallelLinear": "column",
    "TELMHeadColumnParallelLinear": "column",
    "TELayerNormColumnParallelLinear": "column",
    "RowParallelLinear": "row",
    "TERowParallelLinear": "row",
    "TEColumnParallelGroupedLinear": "grouped_column",
    "TERowParallelGroupedLinear": "grouped_row",
    "TELinear": "duplicated",
}
# These call the class above them on what they are given, and change its output alone: a norm (Gemma 2 and 3, EXAONE 4),
# a soft cap (the head of Gemma 2 and 4), a gather (Nemotron's replaced blocks).
_CHANGE_OUTPUT = (
    "TERowParallelLinearLayerNorm", "Gemma2OutputLayer", "Gemma4OutputLayer", "TELayerNormColumnParallelLinearGathered",
    "ColumnParallelLinearGathered",
)  # fmt: skip
# Their gating is W z, with the bias that they carry.
_ROUTERS = ("Router", "TopKRouter")
# These call the gating above them on what they make of their input: its norm (Gemma 4), its float32 (MiniMax M3).
_CHANGE_INPUT = ("Gemma4TopKRouter", "MiniMaxM3TopKRouter")
# What else may hold a matrix inside a decoder layer.
_OTHERS = (*_ROUTERS, "SharedExpertMLP", "VocabParallelEmbedding", "Embedding", "LinearAdapter")


def linear_kind(module: nn.Module, path: str = "") -> str | None:
    """Return column, row, duplicated, grouped_column or grouped_row for Megatron's linears, None for anything else.

    path: the module's, for the message. Raises ModelError for a subclass whose own forward is not known, and for what
    holds a matrix inside a decoder layer and is of no class that is known.
    """
    if type(module) is nn.Linear and (not path or "layers." in path):
        return "duplicated"  # whole on every rank: Gemma 4's gates of per-layer inputs
    base = known_base(module)
    if base is None:
        _check_other(module, path)
        return None
    for cls in type(module).__mro__:
        if cls is base:
            break
        if "forward" in vars(cls) and cls.__name__ not in _CHANGE_OUTPUT:
            raise ModelError(
                f"'{path}' is a {cls.__module__}.{cls.__name__}, which computes more than its {base.__name__}: what it "
                f"does to W z is not known, so it cannot be scored; known are {', '.join((*_KINDS, *_CHANGE_OUTPUT))}. "
                "Use one of these, or parallel.backend=deepspeed or transformers."
            )
    return _KINDS[base.__name__]


def known_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a linear whose forward is W z, None for what is no linear of Megatron's."""
    name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _KINDS), None)
    # The last of that name: Bridge extends single modules by a class that is called as the one it extends.
    return None if name is None else [cls for cls in type(module).__mro__ if cls.__name__ == name][-1]


def changes_output(module: nn.Module) -> bool:
    """Tell whether a linear's own output is no more W z, so that its base class must be watched."""
    return any(cls.__name__ in _CHANGE_OUTPUT for cls in type(module).__mro__)


def known_router(module: nn.Module) -> type[nn.Module]:
    """Return the class of a router whose gating is W z."""
    return next(cls for cls in type(module).__mro__ if cls.__name__ in _ROUTERS)


def check_router(module: nn.Module, path: str) -> None:
    """Raise ModelError for a router whose logits are computed by a class that is not known."""
    owner = next(cls for cls in type(module).__mro__ if "gating" in vars(cls))
    if owner.__name__ not in (*_ROUTERS, *_CHANGE_INPUT):
        raise ModelError(
            f"'{path}' is a {owner.__module__}.{owner.__name__}, whose gating is not known to be W z, so that it "
            f"cannot be scored; known are {', '.join((*_ROUTERS, *_CHANGE_INPUT))}. Use parallel.backend=deepspeed or "
            "transformers."
        )


def _check_other(module: nn.Module, path: str) -> None:
    if "layers." not in path or any(cls.__name__ in _OTHERS for cls in type(module).__mro__):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2:
            raise ModelError(
                f"'{path}' is a {type(module).__module__}.{type(module).__name__}, which holds a matrix ('{name}', "
                f"{tuple(parameter.shape)}) and is no linear of Megatron's: what it does with it is not known. Use "
                "parallel.backend=deepspeed or transformers for this model."
            )
