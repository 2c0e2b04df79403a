"""A model that has the names, kinds and sizes of the scored modules and no weights, for PEFT to adapt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ScoresError, first_line
from plop_dist.values.names import expert_index
from plop_dist.values.scores import Projection


def stand_in(by_holder: Mapping[str, list[Projection]], model_type: str | None) -> Any:
    """Return a module tree on the meta device with these modules and 3-D parameters at their paths."""
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    class StandInConfig(PreTrainedConfig):
        pass

    class StandIn(PreTrainedModel):
        config_class = StandInConfig

        def get_output_embeddings(self) -> Any:  # which "all-linear" leaves out
            names = [path for path, parts in by_holder.items() if parts[0].type == "lm_head"]
            return self.get_submodule(names[0]) if names else None

    StandInConfig.model_type = model_type or ""
    model = StandIn(StandInConfig())
    with torch.device("meta"):
        for path, parts in by_holder.items():
            try:
                _add(model, path, parts)
            except (
                KeyError,
                AttributeError,
                TypeError,
                RuntimeError,
            ) as error:  # for "", "a.weight"
                raise ScoresError(
                    f"scores.json has a module '{path}', which no model can have beside the others "
                    f"({first_line(error)}); the file was edited: score again."
                ) from error
    return model


def _add(model: Any, path: str, parts: list[Projection]) -> None:
    import torch
    from torch import nn

    parent_path, _, name = path.rpartition(".")
    parent: nn.Module = model
    for part in parent_path.split(".") if parent_path else ():
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    sizes = {part.type: part.out_features for part in parts}
    in_features, out_features = parts[0].in_features, sum(sizes.values())
    if parts[0].storage == "expert_parameter":
        num_experts = len({expert_index(part.fqn) for part in parts})
        parent.register_parameter(name, nn.Parameter(torch.empty(num_experts, out_features, in_features)))
    elif parts[0].storage == "other":
        parent.register_parameter(name, nn.Parameter(torch.empty(out_features, in_features)))
    elif parts[0].storage == "router":
        router = nn.Module()
        router.register_parameter("weight", nn.Parameter(torch.empty(out_features, in_features)))
        parent.add_module(name, router)
    else:
        parent.add_module(name, nn.Linear(in_features, out_features, bias=False))
