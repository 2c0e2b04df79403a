"""Which Hugging Face projections a Megatron linear holds: names, layer and expert numbers, output rows.

Where Megatron-Bridge is at hand its mapping registry gives the names of the family; for a model list that a host
brings, the names that Llama, Qwen and DeepSeek share are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from plop_dist.backends.megatron.classes import linear_kind
from plop_dist.backends.megatron.modules import grouped
from plop_dist.backends.megatron.shared_gate import GATE
from plop_dist.errors import ModelError
from plop_dist.measure.blocks import Rows
from plop_dist.values.names import expert_index, layer_index, module_type
from plop_dist.values.scores import Projection

# Global Megatron parameter name -> Hugging Face weights in it, by part ("" if there is only one).
HFNames = Callable[[str], Mapping[str, str] | None]

_LAYER = re.compile(r"^(.*?\bdecoder\.layers\.)(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GATED = ("gate", "up")
# The rows of linear attention's in_proj, in Megatron's order.
_SECTIONS = "qkvzba"

# Megatron's module path below its layer -> the Hugging Face name below `model.layers.N`.
_CONVENTION: dict[str, dict[str, str]] = {
    "self_attention.linear_qkv": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "self_attention.linear_proj": {"": "self_attn.o_proj"},
    "self_attention.linear_q_proj": {"": "self_attn.q_proj"},
    "self_attention.linear_q_down_proj": {"": "self_attn.q_a_proj"},
    "self_attention.linear_q_up_proj": {"": "self_attn.q_b_proj"},
    "self_attention.linear_kv_down_proj": {"": "self_attn.kv_a_proj_with_mqa"},
    "self_attention.linear_kv_up_proj": {"": "self_attn.kv_b_proj"},
    "mlp.router": {"": "mlp.gate"},
}


@dataclass(frozen=True)
class NamedPart:
    """One projection inside a Megatron linear: its Hugging Face path, and its rows among this rank's outputs."""

    fqn: str
    rows: Rows | None


@dataclass(frozen=True)
class NamedLinear:
    """A linear of this rank. path: the local one; parts: what it holds; expert: global index of a routed expert.

    called: what the model calls, the linear itself or the adapter's wrapper around it.
    """

    path: str
    module: nn.Module
    parts: tuple[NamedPart, ...]
    expert: int | None = None
    router: str | None = None
    slot: int | None = None  # which weight of a grouped linear
    called: nn.Module | None = None

    @property
    def fqns(self) -> list[str]:
        """The Hugging Face paths of the parts."""
        return [part.fqn for part in self.parts]


def find_named_linears(model: nn.Module, config: Any, ep_rank: int, hf_names: HFNames) -> Iterator[NamedLinear]:
    """Yield every linear of one model chunk under its Hugging Face names, each routed expert apart.

    Multi-token-prediction layers are left out: Hugging Face models do not have them. So are the linears of adapters;
    what Megatron-Bridge's wrapper wraps goes by the wrapper's path. hf_names: see `conventional_names`
    and `bridge_names`. Raises ModelError for a linear of a class that is not known.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if ".mtp." in f".{path}." or ".adapter." in path:
            continue
        kind = linear_kind(module, path)
        if kind is None:
            continue
        path = path.removesuffix(".to_wrap")
        global_path = _global_path(path, modules)
        router = _router_path(path, global_path)
        if kind.startswith("grouped"):
            num_experts = grouped(module).num_gemms
            first = ep_rank * num_experts
            for slot in range(num_experts):
                names = _names(hf_names, f"{global_path}.weight{first + slot}", global_path)
                parts = _parts(path, names, module, modules, config)
                yield NamedLinear(path, module, parts, first + slot, router, slot, modules[path])
            continue
        match = _LOCAL_EXPERT.search(global_path)
        expert = None
        if match:
            holder = modules[path[: path.index(".local_experts.") + len(".local_experts")]]
            num_local = len(cast(nn.ModuleList, holder))
            expert = ep_rank * num_local + int(match.group(1))
            global_path = f"{global_path[: match.start(1)]}{expert}{global_path[match.end(1) :]}"
        names = _names(hf_names, f"{global_path}.weight", global_path)
        parts = _parts(path, names, module, modules, config)
        yield NamedLinear(path, module, parts, expert, router if match else None, called=modules[path])


def find_shared_gates(model: nn.Module, hf_names: HFNames) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of one chunk that hold the gate of shared experts, and the gates' Hugging Face paths."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if getattr(module, GATE, None) is not None and ".mtp." not in f".{path}.":
            global_path = f"{_global_path(path, modules)}.{GATE}"
            yield module, _names(hf_names, global_path, global_path)[""]


def router_fqn(router: str, hf_names: HFNames) -> str:
    """Return the Hugging Face path of a router, given its global Megatron path."""
    return _names(hf_names, f"{router}.weight", router)[""]


def conventional_names(parameter: str) -> Mapping[str, str] | None:
    """Return the names that most decoder families share, for a model list that comes without a bridge.

    >>> conventional_names("decoder.layers.3.self_attention.linear_proj.weight")
    {'': 'model.layers.3.self_attn.o_proj.weight'}
    """
    path, _, weight = parameter.rpartition(".")
    if path == "output_layer":
        return {"": "lm_head.weight"}
    match = _LAYER.match(f"{path}.")
    if not match:
        return None
    if weight == GATE:
        return {"": f"model.layers.{match.group(2)}.mlp.shared_expert_gate.weight"}
    inner = path[match.end() :]
    names = _CONVENTION.get(inner) or _mlp_names(inner, weight.removeprefix("weight"))
    return names and {part: f"model.layers.{match.group(2)}.{name}.weight" for part, name in names.items()}


def _mlp_names(inner: str, slot: str) -> dict[str, str] | None:
    owner, _, leaf = inner.rpartition(".")
    owner = owner.replace(".local_experts.", ".")
    if slot:
        owner = f"{owner}.{slot}"
    if leaf == "linear_fc1":
        return {"gate": f"{owner}.gate_proj", "up": f"{owner}.up_proj"}
    return {"": f"{owner}.down_proj"} if leaf == "linear_fc2" else None


def bridge_names(registry: Any) -> HFNames:
    """Return the names that a Megatron-Bridge mapping registry gives, for every family it knows."""

    def look_up(parameter: str) -> Mapping[str, str] | None:
        mapping = registry.megatron_to_hf_lookup(parameter)
        if mapping is None:
            return conventional_names(parameter)
        found = {"": mapping.hf_param} if isinstance(mapping.hf_param, str) else dict(mapping.hf_param)
        plain = {part: name.replace(".base_layer.", ".") for part, name in found.items()}
        return _split_fused(parameter, plain)

    return look_up


def below(prefix: str, names: HFNames) -> HFNames:
    """Return the names of the parameters of a submodule, given those of the whole model."""
    return lambda parameter: names(f"{prefix}.{parameter}") or conventional_names(parameter)


def _split_fused(parameter: str, names: dict[str, str]) -> dict[str, str]:
    """Give the logical parts of a weight that the Hugging Face checkpoint itself keeps fused (Phi-3, 3-D experts)."""
    if list(names) != [""]:
        return names
    owner, _, leaf = names[""].removesuffix(".weight").rpartition(".")
    number = re.search(r"(?:\.local_experts\.|\.weight)(\d+)", parameter)
    if number and owner.endswith(".experts"):  # one 3-D parameter for all experts
        owner = f"{owner}.{number.group(1)}"
    if parameter.endswith("linear_qkv.weight"):
        return {part: f"{owner}.{part}_proj.weight" for part in ("q", "k", "v")}
    if ".linear_fc1." in parameter and leaf == "gate_up_proj":
        return {part: f"{owner}.{part}_proj.weight" for part in _GATED}
    return {"": f"{owner}.{leaf}.weight" if owner else f"{leaf}.weight"}


def _names(hf_names: HFNames, parameter: str, global_path: str) -> Mapping[str, str]:
    """Return the Hugging Face paths by part; a linear that no one knows keeps Megatron's path."""
    found = hf_names(parameter) or {"": f"model.{global_path.removeprefix('decoder.')}.weight"}
    return {part: name.removesuffix(".weight") for part, name in found.items()}


def _parts(
    path: str, names: Mapping[str, str], module: nn.Module, modules: Mapping[str, nn.Module], config: Any
) -> tuple[NamedPart, ...]:
    """Return what a linear's rows are. module: the linear itself, which at its path an adapter may wrap."""
    owner, _, leaf = path.rpartition(".")
    sections = getattr(modules.get(owner), "in_proj_split_sections", None)
    if leaf == "in_proj" and sections is not None and sorted("".join(names)) == sorted(_SECTIONS):
        return _section_parts(names, sections)
    if "q" in names and "k" in names:
        return _query_group_parts(names, modules.get(owner), config)
    if set(names) == set(_GATED):
        if not config.gated_linear_unit:
            return (NamedPart(names["up"], None),)
        period = local_out_features(module)
        half = period // 2
        return (NamedPart(names["gate"], Rows(period, 0, half)), NamedPart(names["up"], Rows(period, half, period)))
    if len(names) != 1:
        owner = next(iter(names.values())).rpartition(".")[0]
        return (NamedPart(f"{owner}.{path.rpartition('.')[2]}", None),)  # rows of an unknown layout: scored as one
    return (NamedPart(next(iter(names.values())), None),)


def _section_parts(names: Mapping[str, str], sections: Sequence[int]) -> tuple[NamedPart, ...]:
    """Linear attention's input projection: queries, keys, values, output gate, beta, alpha, of which names join some.

    The order of rows within a projection, which differs in Hugging Face's, leaves every norm as it is.
    """
    ends = list(accumulate(sections))
    places = {part: (_SECTIONS.index(part[0]), _SECTIONS.index(part[-1])) for part in names}
    if any(_SECTIONS[first : last + 1] != part for part, (first, last) in places.items()):  # b before a, as in "ba"
        raise ModelError(f"the rows of in_proj are joined as {', '.join(names)}, which is not known.")
    return tuple(
        NamedPart(names[part], Rows(ends[-1], ends[first] - sections[first], ends[last]))
        for part, (first, last) in places.items()
    )


def _query_group_parts(names: Mapping[str, str], attention: Any, config: Any) -> tuple[NamedPart, ...]:
    """Each query group's rows are [its query heads, (their output gates,) its key head, its value head].

    attention: the module around the linear, with a configuration of its own where layers differ (Gemma 4). Rows that
    Hugging Face's model does not have are no parts: of a layer that reads another's keys, of values that are the keys.
    """
    config = getattr(attention, "config", config)
    groups = config.num_query_groups or config.num_attention_heads
    head = config.kv_channels or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // groups * head
    if getattr(config, "attention_output_gate", False):
        queries *= 2  # query and gate are one projection in Hugging Face
    period = queries + 2 * head
    parts = (
        NamedPart(names["q"], Rows(period, 0, queries)),
        NamedPart(names["k"], Rows(period, queries, queries + head)),
        NamedPart(names["v"], Rows(period, queries + head, period)),
    )
    if getattr(attention, "is_kv_shared_layer", False):
        return parts[:1]
    is_tied = any(getattr(attention, name, False) for name in ("attention_k_eq_v", "_tied_kv"))
    return parts[:2] if is_tied else parts


def local_out_features(module: nn.Module) -> int:
    """Return how many output features this rank holds, for local and Transformer Engine linears alike."""
    weight = next(filter(torch.is_tensor, (getattr(module, name, None) for name in ("weight", "weight0"))), None)
    return cast(int, module.output_size_per_partition) if weight is None else weight.shape[0]


def _global_path(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the path with the layer's number in the whole model instead of the one on this pipeline stage."""
    match = _LAYER.match(f"{path}.")
    if not match:
        return path
    layer = modules[path[: match.end() - 1]]
    number = getattr(layer, "layer_number", None)
    return path if number is None else f"{match.group(1)}{number - 1}.{path[match.end() :]}"


def _router_path(path: str, global_path: str) -> str | None:
    """Return the name of the router that feeds a routed expert."""
    head, found, _ = global_path.partition(".experts.")
    return f"{head}.router" if found and "shared_experts" not in path else None


def logical_projection(
    fqn: str, in_features: int, out_features: int, known: Mapping[str, Projection] | None
) -> Projection:
    """Return the projection of a path: as the Hugging Face model holds it where `known`, else as its own linear."""
    if known and fqn in known:
        return known[fqn]
    storage: dict[str, Any] = {}
    if known and expert_index(fqn) is not None:
        owner, leaf = re.sub(r"\.experts\.\d+\.", ".experts.", fqn).rsplit(".", 1)
        storage = {
            "storage": "expert_parameter",
            "stored_in": f"{owner}.{'gate_up_proj' if leaf != 'down_proj' else leaf}",
        }
    return Projection(
        fqn=fqn, type=module_type(fqn), layer=layer_index(fqn), in_features=in_features, out_features=out_features,
        **storage,
    )  # fmt: skip
