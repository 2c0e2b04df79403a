"""What Megatron-Bridge builds whatever a configuration says, or builds otherwise: refused by field and value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.errors import ModelError

# Fields that Bridge does not read, and what it builds whatever they say: the values of the published models.
_NORMED = {"norm_topk_prob": True}
_FIXED: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": _NORMED,
    "Exaone4_5_ForConditionalGeneration": {"hidden_act": "silu"},
    "ExaoneMoEForCausalLM": _NORMED,
    "ExaoneMoeForCausalLM": _NORMED,
    "FalconH1ForCausalLM": {"mamba_norm_before_gate": False, "time_step_limit": (0.0, math.inf)},
    "Gemma4ForCausalLM": {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": None},
    "Gemma4ForConditionalGeneration": {"hidden_activation": "gelu_pytorch_tanh"},
    "Glm4MoeForCausalLM": _NORMED,
    "Glm4MoeLiteForCausalLM": _NORMED,
    "Glm4vMoeForConditionalGeneration": {"hidden_act": "silu", "n_group": 1, **_NORMED},
    "Mistral3ForConditionalGeneration": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None},
    "NemotronHForCausalLM": _NORMED,
    "OlmoeForCausalLM": {"norm_topk_prob": False},
    "Qwen3NextForCausalLM": _NORMED,
}
# Whose experts' weights, sigmoids, are divided by their sum: in Megatron only where there are two or more of them.
_SIGMOIDS = (
    "DeepseekV3ForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM", "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration", "HYV3ForCausalLM", "MiniMaxM2ForCausalLM",
    "NemotronHForCausalLM",
)  # fmt: skip
# Every how many layers Bridge builds one of full attention, whatever layer_types says; Gemma 3 turns those otherwise.
_FULL_LAYERS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6, "Gemma3ForConditionalGeneration": 6}
# Whose norms of latent queries and keys have 1e-6 in transformers, and in Megatron what the others have: 1e-5, as in
# some published models, makes a difference of 3e-6 in a gain, 1e-2 one of 3e-3.
_LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM")
_MOST_EPS = 1e-5
_ELSEWHERE = "use parallel.backend=deepspeed or transformers for it"


def check_fields(hf_config: Any, family: str, config: Config) -> None:
    """Raise ModelError for what Bridge builds otherwise in some models of a family that it mostly builds right."""
    name, text = config.model.name_or_path, hf_config.get_text_config()
    if text is not hf_config:
        _check_dealt_out(text, family, config)
    for field, built in _FIXED.get(family, {}).items():
        found = getattr(text, field, built)
        if (tuple(found) if isinstance(found, list) else found) != built:
            raise ModelError(
                f"model.name_or_path '{name}': {field} is {found}, where Megatron-Bridge builds {built}, as in the "
                f"published models; {_ELSEWHERE}."
            )
    if family in _SIGMOIDS and getattr(text, "num_experts_per_tok", None) == 1:
        raise ModelError(
            f"model.name_or_path '{name}': num_experts_per_tok is 1, where transformers gives the one expert the "
            f"weight 1, and Megatron its sigmoid; {_ELSEWHERE}."
        )
    if family in _LATENT and text.rms_norm_eps > _MOST_EPS:
        raise ModelError(
            f"model.name_or_path '{name}': rms_norm_eps is {text.rms_norm_eps}, which Megatron takes for the norms of "
            f"latent queries and keys too, where transformers has 1e-06; {_ELSEWHERE}."
        )
    period = _FULL_LAYERS.get(family)
    if period is not None:
        _check_period(text.layer_types, period, name)
    if family.startswith("Gemma4"):
        _check_gemma4(text, config)
    if family.startswith("Exaone4_5") and not text.sliding_window and "full_attention" in text.layer_types:
        raise ModelError(
            f"model.name_or_path '{name}': without sliding_window its layers of full attention see positions, but "
            f"Megatron-Bridge's do not; {_ELSEWHERE}."
        )
    if family == "Exaone4ForCausalLM" and hf_config.sliding_window and "full_attention" in hf_config.layer_types:
        raise ModelError(
            f"model.name_or_path '{name}': with sliding_window {hf_config.sliding_window} its layers of full attention "
            f"see no positions, but Megatron-Bridge's do; {_ELSEWHERE}."
        )
    if family == "GptOssForCausalLM" and 2 * hf_config.intermediate_size == hf_config.hidden_size:
        raise ModelError(
            f"model.name_or_path '{name}': intermediate_size {hf_config.intermediate_size} is half of hidden_size "
            f"{hf_config.hidden_size}, so that Megatron-Bridge cannot tell the rows of experts.gate_up_proj from its "
            f"columns, and does not turn it; {_ELSEWHERE}."
        )


def _check_dealt_out(text: Any, family: str, config: Config) -> None:
    """Raise ModelError for a layout whose ranks share tokens out that the model around the language model keeps."""
    name, parallel = config.model.name_or_path, config.parallel
    what = f"model.name_or_path '{name}' is a {family}, which sees more than text"
    if parallel.cp > 1:
        raise ModelError(
            f"parallel.cp is {parallel.cp}, and {what} and deals its tokens out itself; set parallel.cp=1."
        )
    is_whole = family.startswith("Qwen2Audio") or getattr(text, "hidden_size_per_layer_input", None)
    if parallel.sequence_parallel and is_whole:
        raise ModelError(
            f"parallel.sequence_parallel is true, and {what} and whose tokens Megatron-Bridge does not deal out; set "
            "parallel.sequence_parallel=false."
        )


def _check_gemma4(text: Any, config: Config) -> None:
    name, parallel = config.model.name_or_path, config.parallel
    if parallel.pp > 1 and not text.enable_moe_block:
        raise ModelError(
            f"parallel.pp is {parallel.pp}, and model.name_or_path '{name}' is a Gemma 4 without experts, for which "
            "Megatron-Bridge has no pipeline; set parallel.pp=1."
        )
    heads = (text.num_key_value_heads, text.num_global_key_value_heads)
    if not text.attention_k_eq_v and heads[0] != heads[1]:
        raise ModelError(
            f"model.name_or_path '{name}': num_global_key_value_heads is {heads[1]} without attention_k_eq_v, where "
            f"transformers takes num_key_value_heads, {heads[0]}, and Megatron-Bridge the former; {_ELSEWHERE}."
        )
    if text.enable_moe_block:  # elsewhere it reads layer_types
        kinds = list(text.layer_types)
        _check_period(kinds, kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1, name)


def _check_period(layer_types: Sequence[str], period: int, name: str) -> None:
    for layer, found in enumerate(layer_types):
        built = "sliding_attention" if (layer + 1) % period else "full_attention"
        if found != built:
            raise ModelError(
                f"model.name_or_path '{name}': layer_types[{layer}] is '{found}', where Megatron-Bridge builds "
                f"'{built}', as in the published models (every {period}th layer is of full attention); {_ELSEWHERE}."
            )
