"""Megatron-Bridge's CanonicalLoRA for a part of q, k, v or of gate, up: an adapter that is not there counts as zero.

Importing this module is enough: it mends Bridge's own class too, so a framework that builds that class by itself (verl,
where `actor_rollout_ref.model.external_lib` names this module) needs nothing else. In Megatron-Bridge 0.6.2 a
partial choice fails in forward, in the distributed checkpoint and in the export of merged weights, and the gate and up
adapters' checkpoints do not load at another tensor-parallel size. Under sequence parallelism the adapters of replicated
linears mix up tokens, and Transformer Engine drops a gradient of those behind a fused norm: mended in its LoRA too.
"""

# S sequence, B batch, G local query groups, D kv_channels, F local out_features of the fused linear

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.conversion.peft_bridge import ADAPTER_NAME_MAP, MegatronPeftBridge
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.bridge.peft.canonical_lora import CanonicalLoRA as BridgeCanonicalLoRA
from megatron.bridge.peft.canonical_lora import LoRALinearSplitFC1UpGate, LoRALinearSplitQKV, ModuleDict
from megatron.bridge.peft.utils import ParallelLinearAdapter
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from plop_dist.errors import LayoutError, PlacementError


@dataclass
class CanonicalLoRA(BridgeCanonicalLoRA):
    """One LoRA per logical projection, for any subset of them, with A drawn as PEFT draws it (Kaiming uniform).

    Options are those of Megatron-Bridge's class: target_modules (linear_q, linear_k, linear_v, linear_proj,
    linear_fc1_gate, linear_fc1_up, linear_fc2, or wildcards), dim, alpha, dropout.
    """

    lora_A_init_method: str = "kaiming"


class PartialQKV(LoRALinearSplitQKV):
    """linear_qkv with adapters for any of q, k, v."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the fused output (S, B, F) with the adapters' outputs added, and the bias if it is kept apart.

        F holds, per local query group, [q heads, k, v] of D features each.
        """
        output_SBF, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output_SBF, bias
        config: Any = self.to_wrap.config
        heads, groups, D = config.num_attention_heads, config.num_query_groups, config.kv_channels
        tp_size = (heads + 2 * groups) * D // output_SBF.size(-1)
        G = groups // tp_size
        parts = [("adapter_q", heads // groups), ("adapter_k", 1), ("adapter_v", 1)]
        deltas = [
            _output_or_zeros(self, name, normed, (*output_SBF.shape[:-1], G, width, D), output_SBF, *args, **kwargs)
            for name, width in parts
        ]
        return output_SBF + torch.cat(deltas, dim=-2).reshape(output_SBF.shape), bias


class PartialFC1(LoRALinearSplitFC1UpGate):
    """linear_fc1 with adapters for gate, up or both."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the fused output (S, B, F), F = [gate; up] of this rank, with the adapters' outputs added."""
        output_SBF, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output_SBF, bias
        half = (*output_SBF.shape[:-1], output_SBF.size(-1) // 2)
        deltas = [
            _output_or_zeros(self, name, normed, half, output_SBF, *args, **kwargs)
            for name in ("adapter_gate", "adapter_up")
        ]
        return output_SBF + torch.cat(deltas, dim=-1), bias


def _output_or_zeros(
    wrapper: Any, name: str, normed: Tensor, shape: tuple[int, ...], like: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if name not in wrapper.adapter:
        return like.new_zeros(()).expand(shape)
    return wrapper.adapter_forward(wrapper.adapter[name], normed, *args, **kwargs).reshape(shape)


def _allow_missing(module: nn.Module) -> nn.Module:
    """Return the module Bridge built; if it splits a fused linear, made to work without some of its adapters."""
    if isinstance(module, LoRALinearSplitQKV):
        module.__class__ = PartialQKV
    elif isinstance(module, LoRALinearSplitFC1UpGate):
        module.__class__ = PartialFC1
    else:
        return module
    adapters: Any = module.adapter
    present = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    if isinstance(module, PartialFC1):
        for name, adapter in present.items():
            # By this name Bridge decides to store B as [gate; up], which an adapter of one of the two is not.
            adapter.base_linear_name = adapter.base_linear_name.replace("linear_fc1", f"linear_{name}")
    module.adapter = ModuleDict(present)
    return module


def _check_splittable(linear: nn.Module, full_name: str) -> None:
    config: Any = linear.config
    tp_size = getattr(config, "tensor_model_parallel_size", 1)
    if full_name.endswith("linear_qkv") and (config.num_query_groups or config.num_attention_heads) % tp_size:
        raise LayoutError(
            f"parallel.tp is {tp_size}, but {full_name} has {config.num_query_groups} query groups; adapters of k and "
            "v need parallel.tp to divide them: use a divisor."
        )
    if full_name.endswith("linear_fc1") and not config.gated_linear_unit:
        raise PlacementError(
            f"{full_name} holds no gate: its up projection is the whole linear; adapt it with LoRA's linear_fc1."
        )


_bridge_init = AdapterWrapper.__init__
_bridge_forward = ParallelLinearAdapter.forward
_bridge_transform = BridgeCanonicalLoRA.transform
_bridge_merge = MegatronPeftBridge._merge_lora_adapter_weights


def _transform(
    self: BridgeCanonicalLoRA, m: nn.Module, name: str | None = None, prefix: str | None = None
) -> nn.Module:
    wrapped = _bridge_transform(self, m, name, prefix)
    if wrapped is m:
        return m
    full_name = f"{prefix}.{name}" if prefix else str(name)
    if isinstance(wrapped, LoRALinearSplitQKV | LoRALinearSplitFC1UpGate):
        _check_splittable(m, full_name)
        return _allow_missing(wrapped)
    matched = self.match(m, name, prefix)
    if name == "linear_fc1" and matched is not None and len(self.canonical_mapping[matched[0]]) == 1:
        # Bridge keeps grouped experts' fc1 as one adapter: it would silently adapt gate and up alike.
        raise PlacementError(
            f"{full_name} takes one adapter for gate and up in Megatron-Bridge; choose both of linear_fc1_gate "
            "and linear_fc1_up, or moe_grouped_gemm=False."
        )
    return wrapped


def _init(self: AdapterWrapper, to_wrap: nn.Module, adapter: nn.Module) -> None:
    _bridge_init(self, to_wrap, adapter)
    linear: Any = to_wrap
    if getattr(linear, "return_layernorm_output_gathered", False) and linear.parallel_mode is not None:
        # Transformer Engine's backward (2.20, layernorm_linear.py) adds the gradient of the normed tokens that it
        # returned only where it returned a rank's own: the adapters gather them.
        linear.return_layernorm_output_gathered = False
        for part in adapter.modules():
            if isinstance(part, ParallelLinearAdapter):
                part.disable_sequence_parallel_comm = False


def _forward(self: ParallelLinearAdapter, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    is_whole = self.base_linear_is_parallel or self.is_expert or not self.config.sequence_parallel
    if is_whole or self.tp_group is None:
        return _bridge_forward(self, x, *args, **kwargs)
    # Every rank holds the linear whole and its own tokens, but a part of A and B alone, which all tokens must meet.
    x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
    y = _bridge_forward(self, x, *args, **kwargs)
    return mappings.scatter_to_sequence_parallel_region(y, group=self.tp_group)


def _merge_present(
    self: MegatronPeftBridge, megatron_model: Any, converted_weights_dict: dict[str, Tensor], adapter_weights: Any
) -> dict[str, Tensor]:
    """Return the Hugging Face weights with those adapters merged that exist; the other projections stay as they are."""
    present = {weight.adapter_key for weight in adapter_weights}
    if not converted_weights_dict or not present <= set(ADAPTER_NAME_MAP.values()):
        return _bridge_merge(self, megatron_model, converted_weights_dict, adapter_weights)
    suffixes = tuple(suffix for suffix, key in ADAPTER_NAME_MAP.items() if key in present)
    adapted = {name: weight for name, weight in converted_weights_dict.items() if name.endswith(suffixes)}
    if adapted:
        merged = self._merge_canonical_adapter_from_weights(megatron_model, adapted, adapter_weights)
        converted_weights_dict.update(merged)
    return converted_weights_dict


AdapterWrapper.__init__ = _init
ParallelLinearAdapter.forward = _forward
BridgeCanonicalLoRA.transform = _transform
MegatronPeftBridge._merge_lora_adapter_weights = _merge_present
