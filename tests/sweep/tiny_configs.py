"""A tiny configuration of any architecture of transformers, by what its fields are called; no list of families.

Sizes fit each other because every field of a kind gets the same small number. What a family needs besides stands in
ODD, with the reason that its constructor gives.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 128
FIRST_TOKEN, LAST_TOKEN = 4, 99  # plain text; special tokens of images and sound lie above, padding and the like below
MAX_LAYERS = 6

# The first pattern that a field's name fits gives its value.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|.*_token_type_.*", 2),
    (r"(.*_)?vocab_size(_per_layer_input)?|num_embeddings|.*_hash_buckets|codebook_size", VOCAB_SIZE),
    (r"hidden_size_per_layer_input", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", 512),
    (r"(moe_)?(num_experts_per_tok|num_experts_per_token|topk|top_k|k)|top_k_experts|.*experts_top_k", 2),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|moe_num_experts|num_local_experts", 4),
    (r"(moe_)?(num|n)_shared_experts|n_group|topk_group|n_groups|mamba_n(_)?groups|num_groups", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*(num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups)", 2),
    (r"linear_num_value_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"qk_head_dim", 16),  # qk_nope_head_dim + qk_rope_head_dim
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 16),  # times the heads: twice the hidden size
    (r"mamba_d_ssm", 64),
    (r"rotary_dim", 4),
    (r"(.*_)?(head_dim|head_size|d_kv|dim_head|kv_channels|d_head|mamba_d_head|mamba_headdim|attention_head_size)", 8),
    (r".*(attention_heads|n_heads?|num_heads|self_attention_heads|resampler_heads)", 4),
    (r"q_lora_rank|o_lora_rank", 12),
    (r"kv_lora_rank", 8),
    (r".*(state_size|d_state)", 8),
    (r".*(chunk_size)", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r".*(intermediate_size(_mlp)?|ffn_dim|d_ff|n_inner|d_inner|ffn_hidden_size|mlp_dim|dim_ff|dff"
     r"|feed_forward_size)", 48),
    (r"(num_)?(.*_)?(hidden_layers|n_layers?|layers|depth|num_layers|decoder_layers|encoder_layers|num_blocks)", 2),
    (r"(.*_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|dim|emb_dim|embedding_dim|lru_width"
     r"|word_embed_proj_dim|projection_dim|out_hidden_size|output_dim|hidden_channels|proj_dim|width)", 32),
    (r"image_size|resolution|crop_size", 28),
    (r"patch_size", 14),
    (r"image_seq_length|mm_tokens_per_image", 4),
    (r"num_mel_bins", 16),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_TOKEN = re.compile(r".*(_token_id|_token_index|_id|_index|_idx)$")
_LOW_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "sep_token_id": 3}
_EVEN_IF_NONE = {"head_dim": 8, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_SHORT_MROPE = {
    "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
# as the published models, whose factors are all others than 1; Ministral's original length smaller than the texts
_MINISTRAL_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8,
}  # fmt: skip
_FALCON_FACTORS = {
    "embedding_multiplier": 5.7, "lm_head_multiplier": 0.04, "key_multiplier": 0.4, "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.24,
    "mlp_multipliers": [0.9, 0.6], "ssm_multipliers": [0.35, 0.25, 0.4, 0.5, 0.3],
}  # fmt: skip
# model type -> fields over those by name, and why.
ODD: dict[str, dict[str, Any]] = {
    # rotary sections that add up to half of a head
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "glm4v_text", "glm46v_text"), _MROPE),
    **dict.fromkeys(("glm_ocr_text", "glmga_text"), _SHORT_MROPE),
    # heads of state-space layers, which together are twice the hidden size
    "mamba2": {"num_heads": 8},
    "zamba": {"n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "num_key_value_heads": 4},
    # one layer of each kind
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3_text": {"layer_types": [*["sliding_attention"] * 5, "full_attention"], "num_hidden_layers": 6},
    # as many heads of keys as of queries; no windows, with which some layers see no positions; what the hub has
    "olmoe": {"num_key_value_heads": 4},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
    "glm4v_moe_text": {**_SHORT_MROPE, "head_dim": 8, "use_qk_norm": False},
    "mistral3": {"tie_word_embeddings": False},
    "glm_moe_dsa": {"indexer_rope_interleave": True},
    "falcon_h1": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_norm_before_gate": False, **_FALCON_FACTORS,
    },
    "gemma4_text": {
        "sliding_window": 4, "final_logit_softcapping": 30.0, "global_head_dim": 16, "num_global_key_value_heads": 2,
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "ministral3": {"rope_parameters": _MINISTRAL_YARN},
    "minimax_m3_vl": {"merged_hidden_size": 128, "projector_hidden_size": 32},
    "nemotron_h": {"n_groups": 2},
    "hy_v3": {"first_k_dense_replace": 1},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0]},
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"num_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "esm": {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "mask_token_id": 3},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "emu3": {"vocabulary_map": {"<image>": 120}},
    "funnel": {"block_sizes": [2], "block_repeats": [1]},
}  # fmt: skip
# Parts that are missing or of another type in the default configuration, or that have other fields in it than by
# themselves.
_PARTS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("gemma4", "vision_config"): ("gemma4_vision", {}),
    ("mistral3", "text_config"): ("ministral3", {}),
    ("exaone4_5", "text_config"): (
        "exaone4", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
}  # fmt: skip


def tiny_config(model_type: str, **further: Any) -> PreTrainedConfig:
    """Return the configuration. Raises what transformers raises where its fields do not go together.

    further: fields over all others.
    """
    return _shrunk(CONFIG_MAPPING[model_type], **further)


def _shrunk(config_class: Any, given: Any = None, **further: Any) -> PreTrainedConfig:
    default = config_class() if given is None else given
    fields: dict[str, Any] = {}
    num_special = iter(range(LAST_TOKEN + 1, VOCAB_SIZE))
    for name, value in sorted(vars(default).items()):
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(type(value), value)
        elif name in _LOW_TOKENS and value is not None:
            fields[name] = _LOW_TOKENS[name]
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int) and _TOKEN.match(name) and value > LAST_TOKEN:
            fields[name] = next(num_special)
        elif value is None and name in _EVEN_IF_NONE:
            fields[name] = _EVEN_IF_NONE[name]
        elif isinstance(value, int) and value > 1:
            size = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)
            if size is not None:
                fields[name] = min(size, value) if size != 2 else size
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    layers = _layers(default)
    if layers is not None:
        chosen, per_layer = layers
        fields[_num_layers_field(default)] = len(chosen)
        fields |= {name: [value[index] for index in chosen] for name, value in per_layer.items()}
    for (model_type, name), (part, others) in _PARTS.items():
        if model_type == config_class.model_type:
            fields[name] = tiny_config(part, **others)
    fields |= {**ODD.get(config_class.model_type, {}), **further}
    return config_class(**fields)


def _num_layers_field(config: Any) -> str:
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def _layers(config: Any) -> tuple[list[int], dict[str, Any]] | None:
    """Return one layer of each kind that the configuration has, two at least, and its lists with an entry per layer."""
    number = getattr(config, "num_hidden_layers", None)
    if not isinstance(number, int):
        return None
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == number > 4 and not name.startswith("_")
    }
    if not lists:
        return None
    kinds: dict[Any, int] = {}
    for index, kind in enumerate(zip(*(map(str, value) for value in lists.values()), strict=True)):
        kinds.setdefault(kind, index)
    chosen = sorted(kinds.values())[:MAX_LAYERS]
    if len(chosen) < 2:
        chosen.append(max(chosen) + 1)
    return chosen, dict(lists.items())
