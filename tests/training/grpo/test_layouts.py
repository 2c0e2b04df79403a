"""GRPO at every layout equals one process: the same tokens given, and the same tokens sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.installed import needs_bridge
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import make_placement
from tests.training.grpo.cases import check_equal, run_grpo

GIVEN = {"num_iterations": 2, "beta": 0.05, "loss_type": "grpo"}
SAMPLED = {"max_steps": 2, "temperature": 0.8}
DEEPSPEED = {
    "tp_plan": {"backend": "transformers", "tp": 2},
    "dp2": {"backend": "transformers", "dp": 2},
    "autotp": {"backend": "deepspeed", "tp": 2},
    "pipeline": {"backend": "deepspeed", "pp": 2},
}
MEGATRON = {
    "tp2": {"backend": "megatron", "tp": 2},
    "pp2": {"backend": "megatron", "pp": 2},
    "tp2_sp": {"backend": "megatron", "tp": 2, "sequence_parallel": True},
}
MEGATRON_4 = {"tp2_pp2": {"backend": "megatron", "tp": 2, "pp": 2}}
MEGATRON_MOE = {"ep2": {"backend": "megatron", "dp": 2, "ep": 2}}


def _run(rank: int, directory: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, layout in layouts.items():
        accumulation = {"gradient_accumulation_steps": 4 // layout.get("dp", 1)}
        for kind, sampler, train in (("given", "given", GIVEN), ("sampled", "model", SAMPLED)):
            options = {"train": {**train, **accumulation}, **layout}
            out[f"{name}-{kind}"] = run_grpo(directory, f"{name}-{kind}", sampler=sampler, **options)
            if layout["backend"] == "megatron":
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "world_size", "layouts"),
    [
        ("llama", 2, DEEPSPEED),
        pytest.param("llama", 2, MEGATRON, marks=needs_bridge),
        pytest.param("llama", 4, MEGATRON_4, marks=[needs_bridge, pytest.mark.rare]),
        pytest.param("qwen3_moe", 2, MEGATRON_MOE, marks=[needs_bridge, pytest.mark.rare]),
    ],
    ids=["deepspeed", "megatron", "megatron-4", "megatron-moe"],
)
def test_every_layout_equals_one_process(
    tmp_path: Path, family: str, world_size: int, layouts: dict[str, dict[str, Any]]
) -> None:
    save_tiny(family, tmp_path / "model")
    types = ("q_proj", "v_proj", "o_proj") if family == "qwen3_moe" else ("v_proj", "up_proj", "down_proj")
    placement = make_placement(tiny(family), types)
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    expected = {
        "given": run_grpo(tmp_path, "given", train=GIVEN),
        "sampled": run_grpo(tmp_path, "sampled", sampler="model", train=SAMPLED),
    }
    assert len({len(ids) for ids in expected["given"]["sampled"].values()}) > 3
    ranks = run_ranks(world_size, _run, str(tmp_path), layouts, timeout_s=500)
    for name in layouts:
        for kind, whole in expected.items():
            tokens: dict[tuple[int, int], list[int]] = {}
            for found in ranks:
                check_equal(found[f"{name}-{kind}"], whole, tmp_path, family)
                tokens |= found[f"{name}-{kind}"]["sampled"]
            assert tokens == whole["sampled"], f"{name}: other tokens than in one process"
