"""Which modules are the model's own, under which paths: what adapters and compilers have put around them left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from plop_dist.errors import ModelError
from plop_dist.values.names import unwrapped


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its path in the model as it was before it was compiled, checkpointed or given adapters.

    In the place of a module that an adapter wraps stands the wrapped one, which the adapter's forward calls; what the
    adapter brings along is left out. Raises ModelError for a wrapper of an unknown kind.
    """
    return {unwrapped(path): module for path, module, _ in _walk(model, "", set())}


def adapters_around(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost adapter around each module that one wraps, by the module's path in named_modules()."""
    return {unwrapped(path): outer for path, module, outer in _walk(model, "", set()) if outer is not module}


def parameter_shape(parameter: Any) -> tuple[int, ...]:
    """Return a parameter's global shape, also where ZeRO-3 has released it and its own shape is (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def without_adapters(model: Any) -> nn.Module:
    """Return the transformers model inside PEFT's, whose linears its adapters still wrap, or the model itself.

    Raises ModelError for methods that do more than wrap single modules.
    """
    peft: Any = sys.modules.get("peft")
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None:
        return model
    tuner = model.base_model if isinstance(model, peft.PeftModel | peft.PeftMixedModel) else model
    if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ModelError(
            f"the model carries PEFT's {kind}, which puts tokens of its own before each sample's; score the base "
            "model: model.get_base_model()."
        )
    if tuner is model and not isinstance(tuner, tuners.BaseTuner):
        return model
    # What has a forward of its own runs the model twice (X-LoRA), or others beside it.
    if getattr(type(tuner), "forward", None) is not tuners.BaseTuner.forward:
        raise ModelError(
            f"the model carries PEFT's {type(tuner).__name__}, which changes more of the forward pass than what single "
            "linears return; score the model before it is wrapped."
        )
    return tuner.model


def refuse_adapted_parameters(model: nn.Module) -> None:
    """Raise ModelError where PEFT adds an adapter to a parameter itself (target_parameters), while its module runs.

    What the module then returns is not that of the base weight, which is scored. Collective where parameters are
    sharded.
    """
    layers: Any = sys.modules.get("peft.tuners.lora.layer")
    if layers is None:
        return
    for path, found in model.named_modules():
        module: Any = found
        if not isinstance(module, layers.ParamWrapper) or module.disable_adapters or module.merged:
            continue
        if any(_adds(module.lora_B[name]) for name in module.active_adapters if name in module.lora_B):
            raise ModelError(
                f"Module '{unwrapped(path)}' carries a trained adapter of PEFT's on its parameter "
                f"'{module.parameter_name}', which is added to the weight itself, so that the base weight's gains are "
                "not seen; score the model inside model.disable_adapter()."
            )


def _adds(lora_B: Any) -> bool:
    """Tell whether the second matrix of an adapter is other than zero, or cannot be seen (ZeRO-3)."""
    weight = lora_B.weight
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return not whole.numel() or bool(whole.any())


def _walk(outer: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield what named_modules() yields, in its order, each module once, and what stands in its place in the model."""
    module = _base_of(path, outer)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module, outer
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _base_of(path: str, module: Any) -> nn.Module:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    others: Any = sys.modules.get("peft.utils.other")
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        is_known = tuners is not None and isinstance(module, tuners.BaseTunerLayer)
        if not is_known and type(module).__module__.partition(".")[0] != "plop_dist":
            raise ModelError(
                f"Module '{path}' ({type(module).__name__}) wraps another one (base_layer) in a way that is not known: "
                "its output may not be that of the wrapped weight. Score the model before it is wrapped."
            )
        module = module.base_layer
    if others is not None and isinstance(module, others.AuxiliaryTrainingWrapper):
        copies = getattr(module, "modules_to_save", None)
        active = [] if module.disable_adapters else module.active_adapters
        return copies[active[0]] if copies and active and active[0] in copies else module.original_module
    return module
