"""Tiny models quantised by each kind that runs here, and what their weights are by the quantiser's own account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.models import save_tiny

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
BNB = {"quant_method": "bitsandbytes"}


def torchao(name: str, **fields: Any) -> dict[str, Any]:
    """Return the mapping of one of torchao's configurations, as a config.json has it."""
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": name, "_version": 2, "_data": fields}},
    }


@dataclass(frozen=True)
class Kind:
    """One kind: model.quantization, and the dense weight of a module of it. rounds: its kernel rounds activations."""

    quantization: dict[str, Any]
    dense: Callable[[Any], Tensor]
    rounds: bool = False


def four_bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def eight_bit(module: Any) -> Tensor:
    scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return module.weight.data.double() * scale[:, None].double() / 127


def own(module: Any) -> Tensor:
    return module.weight.dequantize()


def qweight(module: Any) -> Tensor:
    return module.qweight.dequantize()


KINDS = {
    "nf4": Kind({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, four_bit),
    "nf4-double": Kind(
        {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, four_bit
    ),
    "fp4": Kind({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, four_bit),
    "int8": Kind({**BNB, "load_in_8bit": True}, eight_bit, rounds=True),
    "torchao-int8": Kind(torchao("Int8WeightOnlyConfig"), own),
    "torchao-float8": Kind(torchao("Float8WeightOnlyConfig"), own),
    "torchao-int8-dynamic": Kind(torchao("Int8DynamicActivationInt8WeightConfig"), own, rounds=True),
    "quanto-int8": Kind({"quant_method": "quanto", "weights": "int8"}, qweight),
    "quanto-int4": Kind({"quant_method": "quanto", "weights": "int4"}, qweight),
    "quanto-float8": Kind({"quant_method": "quanto", "weights": "float8"}, qweight),
}


def save_plain(folder: Path) -> Path:
    """Save the tiny model that is quantised, in float32."""
    return save_tiny("llama", folder, **SIZES)


def load(folder: Path, quantization: dict[str, Any] | None) -> nn.Module:
    """Return the model by transformers alone."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(quantization))
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options).eval()
