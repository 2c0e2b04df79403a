"""The plan knows models that fit nowhere here: sizes, modules, bytes and refusals from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.costs.plan import build_plan
from plop_dist.errors import DataError, LayoutError
from plop_dist.report.cost_tables import print_plan

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
         "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
PUBLIC: dict[str, dict[str, Any]] = {
    "llama-70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                  "num_attention_heads": 64},
    "llama-405b": {**LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                   "num_attention_heads": 128},
    "qwen3-235b": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
                   "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "head_dim": 128,
                   "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128,
                   "num_experts_per_tok": 8, "tie_word_embeddings": False, "dtype": "bfloat16"},
}  # fmt: skip


def configured(directory: Path, name: str, data: dict[str, Any] | None = None, **parallel: Any) -> Config:
    model = directory / name
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(PUBLIC[name]))
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {n} + {n}?"}) + "\n" for n in range(20)))
    return parse_config(
        {
            "model": {"name_or_path": str(model)},
            "data": data or {"path": str(rows), "text_field": "question", "batch_size": 4, "max_length": 512},
            "parallel": {"backend": "megatron", **parallel},
        }
    )


def test_llama_70b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = build_plan(configured(tmp_path, "llama-70b", tp=8, pp=4, dp=2))
    assert plan.num_parameters == 70_553_706_496
    assert plan.world_size == 64
    assert {entry.type: entry.num_modules for entry in plan.types} == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 80
    )
    assert {entry.num_on_one_rank for entry in plan.types} == {20}
    lora = {entry.type: entry.lora_parameters for entry in plan.types}
    assert lora["v_proj"] == 80 * 16 * (8192 + 1024)
    # 7 rows per layer (five column outputs, two row inputs) of 4 x 512 float32, in one all-reduce.
    assert [(s.scoring.num_collectives, s.scoring.num_bytes) for s in plan.stages] == [(1, 20 * 7 * 2048 * 4)] * 4
    # What the stages hold adds up to the model; norms are whole on every tensor rank.
    norms = (2 * 80 + 1) * 8192
    assert 8 * sum(stage.num_parameters for stage in plan.stages) == 70_553_706_496 + 7 * norms
    assert plan.stages[1].weight_bytes == 2 * plan.stages[1].num_parameters
    print_plan(plan)
    text = capsys.readouterr().out
    assert "70,553,706,496 parameters" in text
    assert "Ranks: 64 · megatron, tp 8, pp 4, dp 2" in text
    assert "What is 0 + 0?" in text


@pytest.mark.slow
def test_sequence_parallel_sends_the_inputs_and_outputs_it_gathers(tmp_path: Path) -> None:
    plan = build_plan(configured(tmp_path, "llama-70b", tp=8, sequence_parallel=True))
    assert plan.stages[0].scoring.num_bytes == 80 * (7 + 2 + 2) * 2048 * 4
    whole = build_plan(configured(tmp_path, "llama-70b", tp=8))
    assert plan.stages[0].activation_bytes < whole.stages[0].activation_bytes


def test_llama_405b_under_zero_3(tmp_path: Path) -> None:
    plan = build_plan(configured(tmp_path, "llama-405b", backend="deepspeed", dp=16, zero_stage=3))
    assert plan.num_parameters == 405_853_388_800
    (stage,) = plan.stages
    assert stage.num_parameters == 405_853_388_800 // 16
    assert stage.scoring.num_collectives == 0
    # Every parameter is gathered once: 7 linears and 2 norms per layer, embedding, last norm, head.
    assert (stage.gathers.num_collectives, stage.gathers.num_bytes) == (126 * 9 + 3, 2 * 405_853_388_800)


@pytest.mark.slow
def test_qwen3_235b(tmp_path: Path) -> None:
    plan = build_plan(configured(tmp_path, "qwen3-235b", tp=4, pp=2, dp=2, ep=8))
    assert plan.num_parameters == 235_093_634_560
    counts = {entry.type: (entry.num_modules, entry.num_on_one_rank) for entry in plan.types}
    assert counts["experts.down_proj"] == (94 * 128, 47 * 16)
    assert counts["q_proj"] == (94, 47)
    assert counts["gate"] == (94, 47)
    stage = plan.stages[0]
    # One all-reduce for attention (4 rows a layer), two gathers for routing (a column per expert and layer, and ids).
    table = 8 * 8 * (1 + 2048 * (1 + 47 * 128))
    assert (stage.scoring.num_collectives, stage.scoring.num_bytes) == (3, 47 * 4 * 2048 * 4 + table)


@pytest.mark.parametrize(
    ("name", "parallel", "message"),
    [
        ("llama-70b", {"tp": 3}, r"parallel\.tp \(3\) does not divide .*num_attention_heads \(64\).*tp=2 or 4"),
        ("llama-70b", {"tp": 16}, r"parallel\.tp \(16\) does not divide .*num_key_value_heads \(8\).*tp=8"),
        ("llama-405b", {"pp": 8}, r"parallel\.pp \(8\) does not divide .*num_hidden_layers \(126\).*pp=7 or 9"),
        ("qwen3-235b", {"dp": 96, "ep": 48}, r"parallel\.ep \(48\) does not divide .*experts \(128\).*ep=32 or 64"),
        ("llama-70b", {"dp": 2, "ep": 2}, r"parallel\.ep is 2, but the model has no experts"),
        ("qwen3-235b", {"backend": "deepspeed", "tp": 4}, r"parallel\.tp is 4 .*no expert's output is whole"),
        ("qwen3-235b", {"backend": "transformers", "tp": 4}, r"parallel\.tp is 4 .*no expert's output is whole"),
        (
            "llama-70b",
            {"backend": "deepspeed", "tp": 9},
            r"tp is 9, but LlamaForCausalLM has 8 num_key.*parallel\.tp=8",
        ),
        ("llama-70b", {"backend": "deepspeed", "pp": 81}, r"has 80 decoder layers; use parallel\.pp=80"),
        (
            "llama-70b",
            {"backend": "transformers", "tp": 3},
            r"divide the 8 num_key_value_heads .*use parallel\.tp=2 or 4",
        ),
    ],
)
def test_refusals(tmp_path: Path, name: str, parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        build_plan(configured(tmp_path, name, **parallel))


def test_what_autotp_shares_out_unevenly_is_counted_at_the_largest_rank(tmp_path: Path) -> None:
    plan = build_plan(configured(tmp_path, "llama-70b", backend="deepspeed", tp=3))
    assert plan.stages[0].num_parameters > plan.num_parameters / 3


@pytest.mark.slow
def test_data(tmp_path: Path) -> None:
    plan = build_plan(configured(tmp_path, "llama-70b"))
    assert plan.data.num_samples == 20
    assert plan.data.first == "What is 0 + 0?"
    assert any("No tokenizer" in text for text in plan.verdict.problems)
    assert any("No weights" in text for text in plan.verdict.problems)
    with pytest.raises(DataError, match="has no column 'answer'"):
        build_plan(configured(tmp_path, "llama-70b", {"path": str(tmp_path / "rows.jsonl"), "text_field": "answer"}))
    plan = build_plan(configured(tmp_path, "llama-70b", {"path": "openai/gsm8k:main", "text_field": "question"}))
    assert plan.data.num_samples is None


def test_a_model_that_counts_its_layers_in_other_words(tmp_path: Path) -> None:
    from tests.models import tiny_tokenizer
    from tests.sweep.tiny_configs import tiny_config

    config = tiny_config("blt")
    config.architectures = ["BltForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "ABC"}) + "\n")
    plan = build_plan(parse_config({
        "run_dir": str(tmp_path / "run"), "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"path": str(rows), "text_field": "text"},
    }))  # fmt: skip
    assert plan.architecture == "BltForCausalLM"
