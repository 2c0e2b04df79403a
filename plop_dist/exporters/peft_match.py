"""What PEFT itself adapts when it is given a configuration, without the model.

PEFT 0.21 does more than match names: beside experts that transformers keeps as 3-D parameters it renames targets, cuts
regexes down to bare names and doubles ranks. So PEFT is asked: it adapts a stand-in on the meta device that has the
scored modules' names, kinds and sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from plop_dist.errors import ConfigError
from plop_dist.values.names import expert_index
from plop_dist.values.scores import Projection

_FIELDS = (
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    "rank_pattern", "modules_to_save",
)  # fmt: skip


def adapted_ranks(
    adapter_config: Mapping[str, Any], projections: Iterable[Projection], model_type: str | None
) -> dict[str, int]:
    """Return the rank of the adapter on each holder (Projection.holder) that PEFT adapts.

    adapter_config: the fields of a peft.LoraConfig; others than those that choose modules and ranks are passed over.
    model_type: transformers' name of the family. Raises ConfigError for what PEFT refuses.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    by_holder: dict[str, list[Projection]] = {}
    for projection in projections:
        by_holder.setdefault(projection.holder, []).append(projection)
    model = _stand_in(by_holder, model_type)
    fields = {name: adapter_config[name] for name in _FIELDS if adapter_config.get(name) is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**fields), model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        # A name may be that of a module which scoring leaves out (an embedding).
        if "not found in the base model" in str(error):
            return {}
        reason = " ".join(str(error).split())
        raise ConfigError(f"PEFT refuses this configuration for {model_type or 'the model'}: {reason}") from error
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            holder = f"{path}.{parameter}" if parameter else path
            # The weight of a linear, named as a parameter
            ranks[holder if holder in by_holder else holder.removesuffix(".weight")] = int(module.r["default"])
    return ranks


def _stand_in(by_holder: Mapping[str, list[Projection]], model_type: str | None) -> Any:
    """Return a module tree on the meta device with these modules and 3-D parameters at their paths."""
    import torch
    from torch import nn
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
            elif parts[0].storage == "router":
                router = nn.Module()
                router.register_parameter("weight", nn.Parameter(torch.empty(out_features, in_features)))
                parent.add_module(name, router)
            else:
                parent.add_module(name, nn.Linear(in_features, out_features, bias=False))
    return model
