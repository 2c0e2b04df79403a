"""Training experts models in Megatron: plain PEFT at expert-parallel layouts; adapters of experts load in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.backends.hf.whole import whole_sites
from plop_dist.training.batch import count_targets, sum_token_losses
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModuleScore, TypeScore
from tests.installed import needs_bridge
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import each_specification, each_specification_rarely, specified
from tests.training.cases import Rows, assert_equal, check_run, make_placement, prepare, run_engine

pytestmark = [pytest.mark.slow, needs_bridge]
ATTENTION = ("q_proj", "v_proj", "o_proj")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_ep2": {"dp": 2, "ep": 2},
    "tp2_ep2_sp": {"tp": 2, "ep": 2, "sequence_parallel": True},
}


def _train(rank: int, directory: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from megatron.core import parallel_state

    out = {}
    for name, layout in layouts.items():
        accumulation = {"gradient_accumulation_steps": 4 // layout.get("dp", 1)}
        out[name] = run_engine("megatron", directory, name, backend="megatron", train=accumulation, **layout)
        parallel_state.destroy_model_parallel()
    return out


@each_specification_rarely
def test_expert_parallel_layouts_equal_one_process(tmp_path: Path, specification: str) -> None:
    expected = prepare(tmp_path, "qwen3_moe", ATTENTION)
    for found in run_ranks(2, specified, specification, _train, str(tmp_path), LAYOUTS):
        for name in LAYOUTS:
            check_run(expected, found[name], tmp_path, "qwen3_moe")


@each_specification
@pytest.mark.parametrize(
    "parts", ["gate, up", *(pytest.param(one, marks=pytest.mark.rare) for one in ("gate, up, down", "down"))]
)
def test_adapters_of_experts_load_in_peft_with_the_same_loss(tmp_path: Path, specification: str, parts: str) -> None:
    from peft import PeftModel

    save_tiny("qwen3_moe", tmp_path / "model")
    model = tiny("qwen3_moe")
    scores = make_placement(model).source
    experts = [
        ModuleScore(**projection.model_dump(), num_tokens=1, gain=1.0, baseline=1.0, nfn=1.0)
        for site in whole_sites(model, False)
        for projection in site.projections
        if projection.type.startswith("experts.")
    ]
    picked = [module for module in experts if module.fqn.rpartition(".")[2].removesuffix("_proj") in parts.split(", ")]
    chosen = tuple(module.fqn for module in picked)
    types = tuple(sorted({module.type for module in picked}))
    rows = [
        TypeScore(type=name, num_modules=sum(m.type == name for m in experts), nfn=1.0)
        for name in sorted({m.type for m in experts})
    ]
    every = scores.model_copy(update={"modules": (*scores.modules, *experts), "types": (*scores.types, *rows)})
    size = num_trainable_parameters(picked, lambda _: 4)
    placement = Placement(
        policy={}, module_types=types, modules=chosen, rank=4, alpha=8, num_trainable_parameters=size
    ).with_source(every)  # fmt: skip
    every.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    (found,) = run_ranks(1, specified, specification, _train, str(tmp_path), {"experts": {}})
    result = found["experts"]["result"]
    assert result["held_out_after"] < result["held_out_before"] - 0.01
    adapted = PeftModel.from_pretrained(model, result["adapter"])
    with torch.no_grad():
        losses = [
            sum_token_losses(
                adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
            )
            for batch in Rows().held_out
        ]
    count = sum(count_targets(batch) for batch in Rows().held_out)
    assert_equal("held-out loss", float(sum(losses)) / count, result["held_out_after"], tolerance=1e-5)
