"""Families beyond Llama and Qwen in Megatron: the scores of transformers, or one error before anything is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from plop_dist.config.loading import parse_config
from plop_dist.errors import ModelError
from tests.backends.megatron.models import config, fresh, gains, logits, samples, true_gains, true_logits
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import each_specification, specified

pytestmark = [pytest.mark.slow, needs_bridge]
TOLERANCE = 1e-5
# transformers' sdpa leaves soft caps out.
EAGER, EAGER_ATTENTION = ("gemma2",), "eager"

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
OSS_YARN = {**YARN, "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
           "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
# Latent attention, a dense layer, then one with routed and shared experts.
DEEPSEEK = {**SIZES, **EXPERTS, "num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 16, "head_dim": 4}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gemma": ("gemma", {**SIZES, "tie_word_embeddings": True}),
    "llama3_rope": ("llama", {**SIZES, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {**SIZES, "sliding_window": 4}),
    "nemotron": ("nemotron", SIZES),
    "qwen3_moe": ("qwen3_moe", {}),
    "llama_yarn": ("llama", {**SIZES, "rope_parameters": YARN}),
}
# Whose layers are Transformer Engine's alone: post-norms, soft caps, attention sinks, query norms over all heads.
GPU_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {**SIZES, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**SIZES, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 48, "rope_parameters": OSS_YARN}),
    "olmoe": ("olmoe", {**SIZES, "num_key_value_heads": 8, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": ("qwen3_next", {}),
    "minimax_m2": ("minimax_m2", {**SIZES, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                                  "rotary_dim": 4, "rope_parameters": HALF_ROTARY}),
}  # fmt: skip
GPU_LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"tp": 2, "sequence_parallel": True}),
    ("gemma3", {"tp": 2}),
    ("gemma3", {"pp": 2}),
    ("gpt_oss", {"tp": 2, "ep": 2, "sequence_parallel": True}),
    ("gpt_oss", {"pp": 2}),
    ("qwen3_next", {"tp": 2, "sequence_parallel": True}),
    ("minimax_m2", {"tp": 2}),
    ("olmoe", {"tp": 2, "sequence_parallel": True}),
]
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v3", {"tp": 2}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "sequence_parallel": True}),
    ("deepseek_v3", {"pp": 2}),
    ("deepseek_v3", {"dp": 2, "ep": 2}),
    ("gemma", {"tp": 2}),
    ("gemma", {"pp": 2}),
    ("llama3_rope", {"tp": 2}),
    ("llama_yarn", {"tp": 2}),
    ("mistral", {"tp": 2, "sequence_parallel": True}),
    ("nemotron", {"tp": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "sequence_parallel": True}),
    ("qwen3_moe", {"pp": 2}),
]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unread_biases": ("qwen3", {"attention_bias": True}, "leaves out 8 of the .* weights, e.g. .*k_proj.bias"),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "no weights for 8 .*linear_fc1.bias.*be random"),
    "a dense layer": ("qwen3_moe", {"mlp_only_layers": [0]}, "no weights for 9 .*; they would be random"),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
                "layer 1 attends to 4 tokens, but Megatron-Bridge's to all; set data.max_length .* to 4 at most"),
    "untied": ("gemma", {**SIZES, "tie_word_embeddings": False}, "leaves out 1 of .* weights, e.g. .lm_head.weight"),
    "softcaps": ("gemma2", SIZES, "is a Gemma2ForCausalLM: Megatron's layers without Transformer Engine"),
    "mixtral": ("mixtral", {}, "is a MixtralForCausalLM, which Megatron-Bridge .* does not know"),
    "yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "rotary embedding .* another in Meg"),
    "gpt2": ("gpt2", {}, "Megatron-Bridge cannot build it .*GPT2LMHeadModel"),
}  # fmt: skip
GPU_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ernie": ("ernie4_5_moe", {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
              "is a Ernie4_5_MoeForCausalLM, which Megatron-Bridge .* builds as another model: it chooses"),
    "square": ("gpt_oss", {"rope_parameters": OSS_YARN}, "intermediate_size 32 is half of hidden_size 64, so that"),
    "nope": ("exaone4", {**SIZES, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
             "with sliding_window 512 its layers of full attention see no positions, but Megatron-Bridge's do"),
    "other layers": ("gemma3_text", {**SIZES, "layer_types": ["sliding_attention", "full_attention"]},
                     "layer_types.1. is 'full_attention', where Megatron-Bridge builds 'sliding_attention', as in"),
    "absorbed": ("glm_moe_dsa", {**DEEPSEEK, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 64,
                                 "indexer_rope_interleave": True, "mlp_layer_types": ["dense", "sparse"]},
                 "is a GlmMoeDsaForCausalLM, which Megatron-Bridge .* with the weight of kv_b_proj in another order"),
    "norm first": ("falcon_h1", {**SIZES, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
                   "mamba_norm_before_gate is True, where Megatron-Bridge builds False, as in the published models"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for name, (family, fields) in {**MODELS, **GPU_MODELS}.items():
        save_tiny(family, directory / name, **fields)
    for name, (family, fields, _) in {**REFUSED, **GPU_REFUSED}.items():
        save_tiny(family, directory / name, **fields)
    return directory


def _compare(rank: int, root: Path, layouts: list[Any]) -> list[tuple[dict[str, tuple[float, int]], Any]]:
    from plop_dist.backends.megatron.backend import load

    report = []
    for name, layout in layouts:
        model = load(config(root / name, **layout))
        report.append((gains(model, samples(), side="left"), logits(model, samples()[1])))
        fresh()
    return report


def _expected(directory: Path) -> tuple[dict[str, tuple[float, int]], Any]:
    from plop_dist.backends.hf.backend import load

    if directory.name in EAGER:
        return true_gains(directory, samples(), EAGER_ATTENTION), true_logits(directory, samples()[1], EAGER_ATTENTION)
    tree = {"model": {"name_or_path": str(directory), "dtype": "float32"}, "data": {"path": "unused"},
            "placement": {"exclude": []}}  # fmt: skip
    return gains(load(parse_config(tree)), samples()), true_logits(directory, samples()[1])


@each_specification
def test_two_ranks_equal_transformers_in_one_process(root: Path, specification: str) -> None:
    layouts = LAYOUTS if specification == "local" else LAYOUTS + GPU_LAYOUTS
    truth = {name: _expected(root / name) for name in dict.fromkeys(name for name, _ in layouts)}
    for report in run_ranks(2, specified, specification, _compare, root, layouts):
        for (name, layout), (found, got) in zip(layouts, report, strict=True):
            expected, true = truth[name]
            if got is not None:
                assert (got - true).abs().max() < TOLERANCE * true.abs().max(), f"{name} {layout}: logits"
            assert found.keys() == expected.keys(), f"{name} {layout}"
            for fqn, (gain, count) in expected.items():
                assert found[fqn][1] == count, f"{name} {layout}: {fqn}"
                assert found[fqn][0] == pytest.approx(gain, rel=TOLERANCE), f"{name} {layout}: {fqn}"


def _refused(rank: int, root: Path, names: list[str]) -> dict[str, str]:
    from plop_dist.backends.megatron.backend import load

    messages = {}
    for name in names:
        with pytest.raises(ModelError) as caught:
            load(config(root / name))
        messages[name] = str(caught.value)
        fresh()
    assert dist.get_world_size() == 1
    return messages


@each_specification
def test_what_bridge_would_get_wrong_is_one_error(root: Path, specification: str) -> None:
    cases = REFUSED if specification == "local" else GPU_REFUSED
    (messages,) = run_ranks(1, specified, specification, _refused, root, list(cases))
    for name, (_, _, pattern) in cases.items():
        with pytest.raises(ModelError, match=pattern):
            raise ModelError(messages[name])
        assert "\n" not in messages[name]
