"""Which families Megatron-Bridge builds as transformers does: those whose logits and gains were compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from plop_dist.backends.hf.own_class import architecture
from plop_dist.backends.megatron.transformer_engine import has_transformer_engine
from plop_dist.config.schema import Config
from plop_dist.errors import MissingExtraError, ModelError

# Equal with Megatron's own layers, i.e. without Transformer Engine; and so with it.
LOCAL_FAMILIES = (
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "NemotronForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip
# Equal with Transformer Engine's layers.
GPU_FAMILIES = (
    *LOCAL_FAMILIES, "Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration", "ExaoneMoEForCausalLM",
    "ExaoneMoeForCausalLM", "FalconH1ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration", "GptOssForCausalLM", "HYV3ForCausalLM",
    "MiniMaxM2ForCausalLM", "Mistral3ForConditionalGeneration", "NemotronHForCausalLM", "OlmoeForCausalLM",
    "Qwen2AudioForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3NextForCausalLM",
    "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
)  # fmt: skip
# Built, and otherwise than transformers does: why.
_SIGMOID = "it chooses experts by a sigmoid, transformers by a softmax"
_WRONG = {
    "Ernie4_5_MoeForCausalLM": _SIGMOID,
    "Ernie4_5_VLMoeForConditionalGeneration": _SIGMOID,
    "GlmMoeDsaForCausalLM": "it multiplies with the weight of kv_b_proj in another order, without calling it",
    "MiniMaxM3SparseForConditionalGeneration": "it leaves out the indexer's projections",
}
# Fields that Bridge does not read, and what it builds whatever they say: the values of the published models.
_FIXED: dict[str, dict[str, Any]] = {
    "Exaone4_5_ForConditionalGeneration": {"hidden_act": "silu"},
    "FalconH1ForCausalLM": {"mamba_norm_before_gate": False, "time_step_limit": (0.0, math.inf)},
    "Gemma4ForCausalLM": {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": None},
    "Gemma4ForConditionalGeneration": {"hidden_activation": "gelu_pytorch_tanh"},
    "Glm4vMoeForConditionalGeneration": {"hidden_act": "silu", "n_group": 1, "norm_topk_prob": True},
    "Mistral3ForConditionalGeneration": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None},
}
# Every how many layers Bridge builds one of full attention, whatever layer_types says; Gemma 3 turns those otherwise.
_FULL_LAYERS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6, "Gemma3ForConditionalGeneration": 6}
# Field of a configuration with such layers -> the package of their kernels, for which Megatron has no other code, and
# what pip calls it. Releases of transformers call the kinds of layers otherwise, the fields alike.
_MAMBA = ("mamba_ssm", "mamba-ssm")
_KERNELS = {
    "linear_num_key_heads": ("fla", "flash-linear-attention"), "mamba_num_heads": _MAMBA, "mamba_n_heads": _MAMBA,
}  # fmt: skip
_ELSEWHERE = "use parallel.backend=deepspeed or transformers for it"


def check_family(hf_config: Any, config: Config) -> None:
    """Raise ModelError for a family that is not known to be right with the layers that are built here."""
    name, family = config.model.name_or_path, architecture(hf_config)
    bridge = f"Megatron-Bridge {version('megatron-bridge')}"
    if family in _WRONG:
        raise ModelError(
            f"model.name_or_path '{name}' is a {family}, which {bridge} builds as another model: {_WRONG[family]}; "
            f"{_ELSEWHERE}."
        )
    if has_transformer_engine() and family not in GPU_FAMILIES:
        raise ModelError(
            f"model.name_or_path '{name}' is a {family}, of which nobody has compared what {bridge} builds with "
            f"transformers; known to be right are {', '.join(GPU_FAMILIES)}; {_ELSEWHERE}."
        )
    if not has_transformer_engine() and family not in LOCAL_FAMILIES:
        raise ModelError(
            f"model.name_or_path '{name}' is a {family}: Megatron's layers without Transformer Engine (not installed "
            f"here) are known to be right for {', '.join(LOCAL_FAMILIES)} alone; {_ELSEWHERE}."
        )
    if config.parallel.cp > 1 and hf_config.get_text_config() is not hf_config:
        raise ModelError(
            f"parallel.cp is {config.parallel.cp}, and model.name_or_path '{name}' is a {family}, which sees images "
            "beside its text and deals its tokens out by itself; set parallel.cp=1."
        )
    _check_fields(hf_config, family, config)
    _check_kernels(hf_config, name)
    why = None if config.train.method != "sft" else _untrained(hf_config, family, config)
    if why is not None:
        raise ModelError(
            f"train.method is '{config.train.method}', and model.name_or_path '{name}' is a {family}, {why}; set "
            "train.method=none, or use parallel.backend=deepspeed or transformers."
        )


def _untrained(hf_config: Any, family: str, config: Config) -> str | None:
    """Return why adapters of this model are not trained rightly in this layout, in which it is scored, or None."""
    text, parallel = hf_config.get_text_config(), config.parallel
    if text is not hf_config:
        return "which sees images beside its text: in Megatron its language model is scored, and not trained"
    if family in ("FalconH1ForCausalLM", "Gemma4ForCausalLM"):
        return "of which nobody has compared how Megatron trains it"
    if parallel.tp == 1:
        return None
    if family == "MiniMaxM2ForCausalLM":
        return "whose norms over all heads pass no gradient from rank to rank: parallel.tp must be 1 to train it"
    has_experts = any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    is_dense = (getattr(text, "first_k_dense_replace", None) or 0) >= text.num_hidden_layers
    if has_experts and not is_dense and not parallel.sequence_parallel:
        return (
            "whose routed experts Megatron trains at parallel.tp above 1 with parallel.sequence_parallel=true alone: "
            "set that"
        )
    return None


def _check_fields(hf_config: Any, family: str, config: Config) -> None:
    """Raise ModelError for what Bridge builds otherwise in some models of a family that it mostly builds right."""
    name, text = config.model.name_or_path, hf_config.get_text_config()
    for field, built in _FIXED.get(family, {}).items():
        found = getattr(text, field, built)
        if (tuple(found) if isinstance(found, list) else found) != built:
            raise ModelError(
                f"model.name_or_path '{name}': {field} is {found}, where Megatron-Bridge builds {built}, as in the "
                f"published models; {_ELSEWHERE}."
            )
    period = _FULL_LAYERS.get(family)
    if period is not None:
        _check_period(text.layer_types, period, name)
    if family.startswith("Gemma4"):
        _check_gemma4(text, hf_config is text, config)
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


def _check_gemma4(text: Any, is_text_alone: bool, config: Config) -> None:
    name, parallel = config.model.name_or_path, config.parallel
    if parallel.pp > 1 and not text.enable_moe_block:
        raise ModelError(
            f"parallel.pp is {parallel.pp}, and model.name_or_path '{name}' is a Gemma 4 without experts, for which "
            "Megatron-Bridge has no pipeline; set parallel.pp=1."
        )
    if parallel.sequence_parallel and text.hidden_size_per_layer_input and not is_text_alone:
        raise ModelError(
            f"parallel.sequence_parallel is true, and model.name_or_path '{name}' is a Gemma 4 with images and inputs "
            "per layer, which Megatron-Bridge does not deal out; set parallel.sequence_parallel=false."
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


def _check_kernels(hf_config: Any, name: str) -> None:
    """Raise MissingExtraError for a package that the model's kinds of layers need and that is not installed."""
    text = hf_config.get_text_config()
    for field, (package, distribution) in _KERNELS.items():
        if getattr(text, field, None) and find_spec(package) is None:
            raise MissingExtraError(
                f"model.name_or_path '{name}' has layers with '{field}' {getattr(text, field)}, for which Megatron "
                f"needs {package}, which is not installed: pip install {distribution}, or {_ELSEWHERE}."
            )
