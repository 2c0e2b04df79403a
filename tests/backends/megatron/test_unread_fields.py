"""What Megatron-Bridge builds whatever a configuration says is refused by field and value, before it is loaded."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.errors import ModelError
from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.sweep.tiny_configs import tiny_config
from tests.te_on_cpu.install import needs_te, specified

pytestmark = [pytest.mark.slow, needs_bridge, needs_te]

FULL = ["full_attention"] * 2
MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
# Class -> (model type, fields of its text part, what is said). The first of a class is one that is taken.
CASES: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("Gemma4ForCausalLM", "gemma4_text", {}, None),
    ("Gemma4ForCausalLM", "gemma4_text", {"num_global_key_value_heads": 1},
     "num_global_key_value_heads is 1 without attention_k_eq_v, where transformers takes num_key_value_heads, 2"),
    ("Gemma4ForCausalLM", "gemma4_text", {"hidden_activation": "silu"},
     "hidden_activation is silu, where Megatron-Bridge builds gelu_pytorch_tanh"),
    ("Gemma4ForCausalLM", "gemma4_text",
     {**MOE, "layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"]},
     r"layer_types\[2\] is 'full_attention', where Megatron-Bridge builds 'sliding_attention'"),
    ("Exaone4_5_ForConditionalGeneration", "exaone4_5", {}, None),
    ("Exaone4_5_ForConditionalGeneration", "exaone4_5", {"sliding_window": None, "layer_types": FULL},
     "without sliding_window its layers of full attention see positions, but Megatron-Bridge's do not"),
    ("Glm4vMoeForConditionalGeneration", "glm4v_moe", {}, None),
    ("Glm4vMoeForConditionalGeneration", "glm4v_moe", {"n_group": 2}, "n_group is 2, where Megatron-Bridge builds 1"),
    ("Mistral3ForConditionalGeneration", "mistral3", {}, None),
    ("Mistral3ForConditionalGeneration", "mistral3", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, where .* 1e-05"),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {}, None),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False, where .* True"),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, where .* sigmoid"),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"rms_norm_eps": 1e-5}, None),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"rms_norm_eps": 1e-4}, "rms_norm_eps is 0.0001, which .* has 1e-06"),
    ("OlmoeForCausalLM", "olmoe", {}, None),
    ("OlmoeForCausalLM", "olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True, where Megatron-Bridge .* False"),
    ("FalconH1ForCausalLM", "falcon_h1", {}, None),
    ("FalconH1ForCausalLM", "falcon_h1", {"time_step_limit": [0.0, 0.1]}, "time_step_limit is .*0.1.*, where Megatron"),
]  # fmt: skip

# Layouts that Bridge does not build, the axis at fault last.
LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", {"cp": 2}),
    ("Qwen2AudioForConditionalGeneration", "qwen2_audio", {"tp": 2, "sequence_parallel": True}),
    ("Gemma4ForConditionalGeneration", "gemma4", {"tp": 2, "sequence_parallel": True}),
    ("Gemma4ForCausalLM", "gemma4_text", {"pp": 2}),
]


def _said(rank: int) -> list[str | None]:
    from plop_dist.backends.megatron.families import check_family

    plain = parse_config(
        {"model": {"name_or_path": "model"}, "data": {"path": "builtin:random"}, "parallel": {"backend": "megatron"}}
    )
    said = []
    for class_name, model_type, fields, _ in CASES:
        hf_config = tiny_config(model_type)
        hf_config.architectures = [class_name]
        for name, value in fields.items():
            setattr(hf_config.get_text_config(), name, value)
        said.append(_message(check_family, hf_config, plain))
    for class_name, model_type, layout in LAYOUTS:
        shared = plain.model_copy(update={"parallel": plain.parallel.model_copy(update=layout)})
        hf_config = tiny_config(model_type)
        hf_config.architectures = [class_name]
        said.append(_message(check_family, hf_config, shared))
    said.append(_message(check_family, SimpleNamespace(architectures=["Step3p5ForCausalLM"]), plain))
    return said


def _message(check: Any, *args: Any) -> str | None:
    try:
        check(*args)
    except ModelError as error:
        return str(error)
    return None


def test_each_is_named_with_what_is_built() -> None:
    (said,) = run_ranks(1, specified, "transformer_engine", _said)
    for (class_name, _, fields, expected), found in zip(CASES, said, strict=False):
        if expected is None:
            assert found is None, f"{class_name} {fields}: {found}"
        else:
            assert re.search(expected, found or ""), f"{class_name} {fields}: {found}"
    for (class_name, _, layout), found in zip(LAYOUTS, said[len(CASES) :], strict=False):
        axis, value = next(reversed(layout.items()))
        assert re.search(f"^parallel.{axis} is {str(value).lower()}, .* is a ({class_name}|Gemma 4)", found or ""), (
            found
        )
    assert "is a Step3p5ForCausalLM, of which nobody has compared what Megatron-Bridge" in said[-1]
