"""How Megatron's adapters of single experts become PEFT's adapters of the parameters that hold all experts.

transformers keeps a layer's experts in two 3-D parameters, down_proj and gate_up_proj. PEFT adapts each expert's slice
by B_e A_e; gate and up, which Megatron adapts apart, are together one such product of twice their rank.
"""

# E experts, R rank, I in_features, O out_features

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"base_model\.model\.(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.lora_([AB])\.weight")
_FUSED = "experts.gate_up_proj"


def fuse_experts(tensors: Mapping[str, Tensor], peft_config: Any, whole: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors as PEFT names and shapes them; peft_config gets the rank of gate and up together.

    tensors: lora_A (R, I) and lora_B (O, R) under `base_model.model.<path>.<expert>.<name>_proj`. whole: the Hugging
    Face model on the meta device; PEFT's layers are put into it.
    """
    from peft import get_peft_model

    experts: dict[tuple[str, int, str, str], Tensor] = {}
    fused = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key)
        if match:
            experts[match[1], int(match[2]), match[3], match[4]] = tensor
        else:
            fused[key] = tensor
    if any(name != "down" for _, _, name, _ in experts):
        peft_config.rank_pattern = {**peft_config.rank_pattern, _FUSED: 2 * peft_config.r}
        peft_config.alpha_pattern = {**peft_config.alpha_pattern, _FUSED: 2 * peft_config.lora_alpha}
    for path, wrapper in get_peft_model(whole, peft_config).named_modules():
        name = getattr(wrapper, "parameter_name", None)
        if name is None:
            continue
        owner = path.removeprefix("base_model.model.").replace(".base_layer", "")
        pairs = [_pair(experts, owner, expert, name) for expert in range(wrapper.num_experts)]
        if not wrapper._did_swap_in_out_features:  # then PEFT multiplies the other way round
            pairs = [(B_OR.T, A_RI.T) for A_RI, B_OR in pairs]
        fused[f"{path}.lora_A.weight"] = torch.cat([A_RI for A_RI, _ in pairs]).contiguous()
        fused[f"{path}.lora_B.weight"] = torch.stack([B_OR for _, B_OR in pairs], dim=-1).flatten(1).contiguous()
    return fused


def _pair(experts: Mapping[tuple[str, int, str, str], Tensor], owner: str, expert: int, name: str) -> Any:
    """Return A (R, I) and B (O, R) of one expert's slice of a parameter."""
    if name == "down_proj":
        return experts[owner, expert, "down", "A"], experts[owner, expert, "down", "B"]
    gate, up = ([experts[owner, expert, part, side] for side in "AB"] for part in ("gate", "up"))
    return torch.cat([gate[0], up[0]]), torch.block_diag(gate[1], up[1])
