"""Placements of tiny models for the export tests, without scoring: NFNs are made up, names and sizes are real."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.linears import find_linears
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import layer_index, module_type
from plop_dist.values.placement import Placement
from plop_dist.values.scores import DataInfo, ModelInfo, ModuleScore, Projection, Scores, TypeScore
from tests.models import tiny


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    """Return the tiny model; PEFT changes a model in place, so tests that adapt one take a copy."""
    return tiny(family)


def projections_of(model: nn.Module) -> list[Projection]:
    """Return every logical projection: the modules', and those in 3-D expert parameters."""
    found = [block.projection for linear in find_linears(model) for block in linear.blocks]
    return found + [item for site in find_expert_sites(model) for item in site.projections]


def projection(fqn: str, in_features: int, out_features: int, storage: str = "linear", stored_in: str | None = None):
    """Return a projection with the type and layer that its path says."""
    return Projection(
        fqn=fqn,
        type=module_type(fqn),
        layer=layer_index(fqn),
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        stored_in=stored_in,
    )


def scores_of(projections: Iterable[Projection], left_out: Iterable[Projection] = (), name: str = "tiny") -> Scores:
    """Return scores that list these projections, with made-up NFNs."""
    modules = tuple(
        ModuleScore(**item.model_dump(), num_tokens=10, gain=1.0 + index / 100, baseline=1.0, nfn=1.0 + index / 100)
        for index, item in enumerate(projections)
    )
    types = []
    for type_ in dict.fromkeys(module.type for module in modules):
        nfns = [module.nfn for module in modules if module.type == type_]
        types.append(TypeScore(type=type_, num_modules=len(nfns), nfn=sum(nfns) / len(nfns)))
    return Scores(
        model=ModelInfo(name_or_path=name),
        data=DataInfo(),
        estimator={},
        parallel={},
        modules=modules,
        types=tuple(types),
        left_out=tuple({**item.model_dump(), "reason": "no_tokens"} for item in left_out),
    )


def place(
    scores: Scores,
    types: Iterable[str] = (),
    *,
    where: Callable[[Projection], bool] = lambda projection: True,
    rank: int = 4,
    alpha: float = 8,
    rank_pattern: dict[str, int] | None = None,
) -> Placement:
    """Return the placement of all modules of `types` (all types if none is given) for which `where` holds."""
    wanted = set(types) or {module.type for module in scores.modules}
    modules = [module for module in scores.modules if module.type in wanted and where(module)]
    placement = Placement(
        policy={},
        module_types=tuple(dict.fromkeys(module.type for module in modules)),
        modules=tuple(module.fqn for module in modules),
        rank=rank,
        alpha=alpha,
        rank_pattern=rank_pattern or {},
        num_trainable_parameters=0,
    ).with_source(scores)
    count = num_trainable_parameters(modules, placement.rank_of, scores.left_out)
    return placement.model_copy(update={"num_trainable_parameters": count}).with_source(scores)


def llama_projections(num_layers: int = 2, *, stack: str = "model.layers") -> list[Projection]:
    """Return a Llama's projections: 4 heads of 8, 2 key-value heads, hidden 32, MLP 48."""
    sizes = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 16),
        "self_attn.v_proj": (32, 16),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (32, 48),
        "mlp.up_proj": (32, 48),
        "mlp.down_proj": (48, 32),
    }
    return [projection(f"{stack}.{layer}.{name}", *size) for layer in range(num_layers) for name, size in sizes.items()]


def adapted_paths(model: nn.Module) -> set[str]:
    """Return the modules and expert parameters that PEFT has put a LoRA layer on."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", "")
            found.add(path if parameter in ("", "weight") else f"{path}.{parameter}")
    return found


def chosen_paths(placement: Placement) -> set[str]:
    """Return the holders' modules, a parameter called weight standing for its module."""
    return {module.holder.removesuffix(".weight") for module in placement.chosen}
