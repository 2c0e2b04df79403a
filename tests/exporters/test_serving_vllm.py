"""Adapters of exports, and of every layout that trains, served by vLLM on a CPU as PEFT computes them."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from plop_dist.exporters.exporter import find_exporter
from tests.exporters.cases import place, projections_of, scores_of
from tests.installed import HAS_BRIDGE
from tests.models import random_tokens, save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import make_placement, run_engine
from tests.vllm_server import PYTHON, environment, needs_vllm

# vLLM's attention on a CPU has no head of fewer features.
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT: list[int] = random_tokens(1, 12)[0].tolist()

pytestmark = [pytest.mark.rare, needs_vllm]


def served(model: Path, adapters: Sequence[Path], max_rank: int = 16) -> dict[str, Any]:
    """Return what vLLM generates with the base model and with each adapter, by folder name."""
    script = Path(__file__).with_name("vllm_greedy.py")
    command = [str(PYTHON), str(script), str(model), str(max_rank), json.dumps(PROMPT), *map(str, adapters)]
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    told = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, cwd=model)
    assert told.returncode == 0, told.stderr[-3000:]
    return json.loads(told.stdout.splitlines()[-1])


def greedy(model: torch.nn.Module, num_tokens: int = 8) -> dict[str, Any]:
    """Return the model's greedy tokens after the prompt, and the log-probability of each."""
    ids, found = list(PROMPT), []
    with torch.no_grad():
        for _ in range(num_tokens):
            scores_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores_V.argmax()))
            found.append(float(scores_V[ids[-1]]))
    return {"tokens": ids[len(PROMPT) :], "logprobs": found}


def assert_like_peft(found: dict[str, Any], base: PreTrainedModel, adapter: Path, unadapted: dict[str, Any]) -> None:
    """Hold what vLLM generated against PEFT on the same adapter, which must differ from the base model."""
    expected = greedy(PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval())
    assert "refused" not in found, found
    assert found["tokens"] == expected["tokens"]
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert expected["logprobs"] != pytest.approx(unadapted["logprobs"], abs=1e-2)


def exported(base: PreTrainedModel, directory: Path, types: Sequence[str], ranks: dict[str, int]) -> Path:
    """Save an adapter with random weights of what `export --to peft` writes for a placement of these types."""
    placement = place(scores_of(projections_of(base)), types, rank_pattern=ranks)
    directory.mkdir()
    config_file = directory / "adapter_config.json"
    config_file.write_text(find_exporter("peft").export(placement).files[config_file.name])
    config = PeftConfig.from_pretrained(str(directory))
    config.base_model_name_or_path = None
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5 if "lora_B" in name else 0.3, generator=generator)
    model.save_pretrained(str(directory))
    return directory


def test_exports_are_served_as_peft_computes_them(tmp_path: Path) -> None:
    base = tiny("llama", **SIZES)
    cases = {
        "parts": (("v_proj", "up_proj", "down_proj"), {}),
        "ranks": (("q_proj", "o_proj", "gate_proj", "v_proj"), {"o_proj": 8, "v_proj": 2}),
        "head": (("lm_head", "k_proj"), {}),
    }
    adapters = [exported(base, tmp_path / name, *case) for name, case in cases.items()]
    too_high = exported(base, tmp_path / "too_high", ("v_proj",), {"v_proj": 32})
    found = served(save_tiny("llama", tmp_path / "model", **SIZES), [*adapters, too_high])
    assert found["base"]["tokens"] == greedy(base)["tokens"]
    for adapter in adapters:
        assert_like_peft(found[adapter.name], base, adapter, found["base"])
    assert "LoRA rank 32 is greater than max_lora_rank 16" in found["too_high"]["refused"]


def test_3d_experts_are_refused_by_a_class_that_keeps_experts_apart(tmp_path: Path) -> None:
    base = tiny("qwen3_moe", **SIZES)
    cases = {"down": ("experts.down_proj",), "all": ("experts.gate_proj", "experts.up_proj", "experts.down_proj")}
    adapters = [exported(base, tmp_path / name, types, {}) for name, types in cases.items()]
    # Nothing is generated: vLLM's MoE layers with LoRA need a GPU.
    found = served(save_tiny("qwen3_moe", tmp_path / "model", **SIZES), adapters)
    for name in cases:
        assert "contains fused 3D MoE weights" in found[name]["refused"]
        assert "--enable-mixed-moe-lora-format" in found[name]["refused"]


LAYOUTS = {
    "tp_plan": {"backend": "transformers", "tp": 2},
    "autotp": {"backend": "deepspeed", "tp": 2},
    "pipeline": {"backend": "deepspeed", "pp": 2},
}
MEGATRON = {
    "tp2": {"backend": "megatron", "tp": 2},
    "pp2": {"backend": "megatron", "pp": 2},
    "tp2_sp": {"backend": "megatron", "tp": 2, "sequence_parallel": True},
}


def _train(rank: int, directory: str, layouts: dict[str, dict[str, Any]]) -> None:
    for name, layout in layouts.items():
        # High and long enough that greedy tokens change, which an adapter that is dropped would not do.
        train = {"learning_rate": 0.1, "max_grad_norm": 10.0}
        run_engine("megatron" if layout["backend"] == "megatron" else name, directory, name, train=train, **layout)
        if layout["backend"] == "megatron":
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()


def test_adapters_of_every_layout_are_served_as_peft_computes_them(tmp_path: Path) -> None:
    base = tiny("llama", **SIZES)
    save_tiny("llama", tmp_path / "model", **SIZES)
    placement = make_placement(base)
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    run_ranks(2, _train, str(tmp_path), LAYOUTS, timeout_s=300)
    if HAS_BRIDGE:
        run_ranks(2, _train, str(tmp_path), MEGATRON, timeout_s=300)
    names = [*LAYOUTS, *(MEGATRON if HAS_BRIDGE else ())]
    adapters = {name: tmp_path / name / "train" / "adapter" for name in names}
    (tmp_path / "served").mkdir()
    links = [tmp_path / "served" / name for name in names]
    for link in links:
        link.symlink_to(adapters[link.name], target_is_directory=True)
    found = served(tmp_path / "model", links)
    for name, adapter in adapters.items():
        assert_like_peft(found[name], base, adapter, found["base"])
