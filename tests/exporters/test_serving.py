"""What `export --to peft` says of servers that would not apply an adapter: by type, by server, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.exporters.exporter import find_exporter
from plop_dist.launch.rank import export
from plop_dist.rundir.stages import Stages
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection
from tests.exporters.cases import llama_projections, model_of, place, projection, projections_of, scores_of

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


def warnings_of(placement: Placement, server: str = "") -> list[str]:
    """Return the warnings of the servers whose names begin so."""
    return [text for text in find_exporter("peft").export(placement).warnings if text.startswith(server)]


def chosen(types: Sequence[str], projections: Sequence[Projection] = (), **options: object) -> Placement:
    return place(scores_of(projections or llama_projections()), types, **options)  # pyright: ignore[reportArgumentType]


def names(text: str) -> str:
    """Return the types that a warning names."""
    return text.partition("apply ")[2].partition(":")[0]


@pytest.mark.parametrize(
    "types", [(*QKV, "o_proj", *MLP), ("q_proj", "v_proj"), ("gate_proj", "down_proj"), ("o_proj",)], ids=", ".join
)
def test_what_both_servers_apply_is_not_warned_of(types):
    assert warnings_of(chosen(types)) == []


@pytest.mark.parametrize(
    ("types", "lost"),
    [
        (("v_proj", "up_proj", "down_proj"), ["v_proj", "up_proj"]),
        (("q_proj", "o_proj"), ["q_proj"]),
        (("q_proj", "k_proj"), ["k_proj and q_proj"]),
        (("up_proj",), ["up_proj"]),
    ],
)
def test_sglang_finds_parts_of_a_packed_linear_only_beside_their_first(types, lost):
    found = warnings_of(chosen(types))
    assert [names(text) for text in found] == lost
    assert all(text.startswith("SGLang 0.5 does not apply ") and "it packs " in text for text in found)


def test_parts_count_in_each_layer_by_itself():
    placement = chosen(("q_proj", "v_proj"), where=lambda item: item.type == "v_proj" or item.layer == 0)
    assert [names(text) for text in warnings_of(placement)] == ["v_proj"]


@pytest.mark.parametrize(
    ("rank", "pattern", "said"),
    [
        (16, {}, None),
        (4, {"o_proj": 24}, "whose highest rank is 24, unless it is started with --max-lora-rank 32."),
        (320, {}, "--max-lora-rank 320."),
        (600, {}, "its highest rank is 600, and no --max-lora-rank is over 512."),
    ],
)
def test_the_highest_rank_is_held_against_what_vllm_takes(rank, pattern, said):
    found = warnings_of(chosen(("q_proj", "v_proj", "o_proj"), rank=rank, rank_pattern=pattern), "vLLM")
    assert len(found) == (said is not None)
    assert all(said in text for text in found)


def test_sglang_takes_one_rank():
    placement = chosen(("q_proj", "v_proj", "o_proj"), rank_pattern={"o_proj": 8})
    [found] = warnings_of(placement)
    assert names(found) == "o_proj"
    assert "one rank for all modules, which here is r = 4" in found


def test_an_unknown_module_is_said_to_be_not_known():
    items = [*llama_projections(), projection("model.layers.0.mixer.c_fancy", 32, 32, "other", "model.layers.0.fancy")]
    found = warnings_of(chosen(("c_fancy", "o_proj"), items))
    assert [text.partition(":")[0] for text in found] == [
        "vLLM 0.32 is not known to apply c_fancy", "SGLang 0.5 is not known to apply c_fancy",
    ]  # fmt: skip
    assert all(text.endswith("Compare its log-probabilities with PEFT's.") for text in found)


def test_the_head_is_known_to_sglang_alone():
    items = [*llama_projections(), projection("lm_head", 32, 128)]
    [found] = warnings_of(chosen(("lm_head", "o_proj"), items))
    assert found.startswith("vLLM 0.32 is not known to apply lm_head: its class of the model must list the head")


def test_latent_attention_is_folded_into_vllms_kernel():
    names_of = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    items = [projection(f"model.layers.0.self_attn.{name}", 32, 32) for name in names_of]
    [found] = warnings_of(chosen(names_of, items))
    assert found.startswith("vLLM 0.32 does not apply kv_b_proj: it folds this weight into its attention")
    [found] = warnings_of(chosen(("kv_a_proj_with_mqa",), items))
    assert found.startswith("SGLang 0.5 does not apply kv_a_proj_with_mqa: it packs q_a_proj and kv_a_proj_with_mqa")


def test_a_vision_towers_linears_are_not_known_to_be_served():
    tower = projection("model.visual.blocks.0.attn.proj", 32, 32)
    items = [*llama_projections(), tower.model_copy(update={"part": "vision", "type": "vision.proj"})]
    found = warnings_of(chosen(("vision.proj", "o_proj"), items))
    assert [names(text) for text in found] == ["vision.proj"] * 2
    assert all("is not known to apply" in text and "towers and projectors" in text for text in found)


@pytest.mark.parametrize("types", [EXPERTS[2:], EXPERTS[:2]], ids=["down", "gate and up"])
def test_3d_experts_in_part_are_not_applied(types):
    vllm, sglang = warnings_of(chosen(types, projections_of(model_of("qwen3_moe"))))
    lost = "experts.down_proj" if len(types) == 1 else "experts.gate_proj and experts.up_proj"
    assert vllm.startswith(f"vLLM 0.32 does not apply {lost}: it takes adapters of routed experts only where gate, up")
    assert sglang.startswith(f"SGLang 0.5 does not apply {lost}: it reads routed experts one by one")


def test_whole_3d_experts_depend_on_vllms_class():
    vllm, sglang = warnings_of(chosen(EXPERTS, projections_of(model_of("qwen3_moe"))))
    assert vllm.startswith("vLLM 0.32 is not known to apply experts.down_proj, experts.gate_proj and experts.up_proj:")
    assert "--enable-mixed-moe-lora-format" in vllm
    assert "does not apply" in sglang


def test_experts_that_are_linears_are_applied_together_or_not():
    parts = [f"model.layers.0.mlp.experts.{index}.{name}" for index in range(2) for name in MLP]
    items = [projection(path, 32, 32) for path in parts]
    assert warnings_of(chosen(EXPERTS, items)) == []
    found = warnings_of(chosen(EXPERTS[1:], items))
    assert [names(text) for text in found] == ["experts.down_proj and experts.up_proj"] * 2


def test_a_hybrids_linears_and_routers_are_not_known_to_be_served():
    types = ("in_proj_qkvz", "out_proj", "gate", "shared_expert_gate", "down_proj")
    found = warnings_of(chosen(types, projections_of(model_of("qwen3_next"))))
    assert sorted((text.split()[0], names(text)) for text in found) == [
        ("SGLang", "down_proj"), ("SGLang", "gate and shared_expert_gate"), ("SGLang", "in_proj_qkvz and out_proj"),
        ("vLLM", "gate and shared_expert_gate"), ("vLLM", "in_proj_qkvz and out_proj"),
    ]  # fmt: skip
    assert all("is not known to apply" in text for text in found)


@pytest.mark.slow
def test_the_command_warns_on_stderr_and_in_json(tmp_path: Path):
    placement = chosen(("v_proj", "o_proj"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    command = [sys.executable, "-m", "plop_dist.cli", "export", str(tmp_path), "--to", "peft"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    [expected] = warnings_of(placement)
    assert f"warning: {expected}" in told.stderr
    assert "warning" not in told.stdout
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(told.stdout)["warnings"] == [expected]
    assert json.loads((tmp_path / "exports" / "peft" / "export.json").read_text())["warnings"] == [expected]


def test_a_run_tells_notes_and_warnings_of_what_it_exports(tmp_path: Path):
    placement = chosen(("v_proj", "o_proj"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    keys = {"run_dir": str(tmp_path), "model": {"name_or_path": "unused"}, "data": {"path": "unused"}}
    stages = Stages(parse_config({**keys, "export": {"targets": ["peft", "deepspeed"]}}))
    told: list[str] = []
    export(stages, lambda kind, **fields: told.append(fields["text"]))
    [expected] = warnings_of(placement)
    assert f"warning: export to peft: {expected}" in told
    records = {t: json.loads((tmp_path / "exports" / t / "export.json").read_text()) for t in ("peft", "deepspeed")}
    for target, record in records.items():
        assert all(f"note: export to {target}: {note}" in told for note in record["notes"])
    assert any(record["notes"] for record in records.values())
