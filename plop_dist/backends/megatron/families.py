"""Which families Megatron-Bridge builds as transformers does: those whose logits and gains were compared."""

from __future__ import annotations

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
    *LOCAL_FAMILIES, "Exaone4ForCausalLM", "ExaoneMoeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GptOssForCausalLM",
    "HYV3ForCausalLM", "MiniMaxM2ForCausalLM", "NemotronHForCausalLM", "OlmoeForCausalLM",
    "Qwen2AudioForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3NextForCausalLM",
    "Qwen3VLForConditionalGeneration", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
)  # fmt: skip
# Built, and otherwise than transformers does: why.
_WRONG = {
    "Ernie4_5_MoeForCausalLM": "it chooses experts by a sigmoid, transformers by a softmax",
}
# Every how many layers Bridge builds one of full attention, whatever layer_types says; Gemma 3 turns those otherwise.
_FULL_LAYERS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6, "Gemma3ForConditionalGeneration": 6}
# Field of a configuration with such layers -> the package of their kernels, for which Megatron has no other code, and
# what pip calls it. Releases of transformers call the kinds of layers otherwise, the fields alike.
_KERNELS = {"linear_num_key_heads": ("fla", "flash-linear-attention"), "mamba_num_heads": ("mamba_ssm", "mamba-ssm")}
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
    _check_fields(hf_config, family, name)
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


def _check_fields(hf_config: Any, family: str, name: str) -> None:
    """Raise ModelError for what Bridge builds otherwise in some models of a family that it mostly builds right."""
    period = _FULL_LAYERS.get(family)
    if period is not None:
        _check_period(hf_config.get_text_config().layer_types, period, name)
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
