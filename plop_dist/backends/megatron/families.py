"""Which families Megatron-Bridge builds as transformers does: those whose logits and gains were compared."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from plop_dist.backends.hf.own_class import architecture
from plop_dist.backends.megatron.transformer_engine import has_transformer_engine
from plop_dist.backends.megatron.unread_fields import check_fields
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
# Field of a configuration -> the package of its layers' kernels, for which Megatron has no other code, and
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
    check_fields(hf_config, family, config)
    _check_kernels(hf_config, name)
    why = _untrained(hf_config, family, config) if config.train.is_in_these_ranks else None
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
    if config.train.packing and (has_transformer_engine() or getattr(text, "sliding_window", None)):
        return "whose samples Megatron does not keep apart in a packed row here: set train.packing=false"
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


def _check_kernels(hf_config: Any, name: str) -> None:
    """Raise MissingExtraError for a package that the model's kinds of layers need and that is not installed."""
    text = hf_config.get_text_config()
    for field, (package, distribution) in _KERNELS.items():
        if getattr(text, field, None) and find_spec(package) is None:
            raise MissingExtraError(
                f"model.name_or_path '{name}' has layers with '{field}' {getattr(text, field)}, for which Megatron "
                f"needs {package}, which is not installed: pip install {distribution}, or {_ELSEWHERE}."
            )
