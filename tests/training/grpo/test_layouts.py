"""GRPO at every layout equals one process: the same tokens given, and the same tokens sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plop_dist.checkpoints.builtin import resolve
from plop_dist.values.placement import Placement
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


# SmolLM2 has 9 heads and 3 of keys and values, which tp 2 does not divide.
SMOLLM2_3 = {
    "tp_plan": {"backend": "transformers", "tp": 3},
    "autotp": {"backend": "deepspeed", "tp": 3},
    "tp3": {"backend": "megatron", "tp": 3},
    "tp3_sp": {"backend": "megatron", "tp": 3, "sequence_parallel": True},
}
SMOLLM2_2 = {
    "pipeline": {"backend": "deepspeed", "pp": 2},
    "pp2": {"backend": "megatron", "pp": 2},
}


def _run(rank: int, directory: str, layouts: dict[str, dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, layout in layouts.items():
        accumulation = {"gradient_accumulation_steps": 4 // layout.get("dp", 1)}
        for kind, sampler, train in (("given", "given", GIVEN), ("sampled", "model", SAMPLED)):
            options = {"train": {**train, **accumulation, **more}, **layout}
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
    _check_layouts(tmp_path, make_placement(tiny(family), types), lambda: tiny(family), world_size, layouts, {})


@needs_bridge
@pytest.mark.rare
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world_size", "layouts"), [(2, SMOLLM2_2), (3, SMOLLM2_3)], ids=["2", "3"])
def test_smollm2_trains_for_reward_in_every_layout_as_in_one_process(
    tmp_path: Path, world_size: int, layouts: dict[str, dict[str, Any]]
) -> None:
    whole = Path(resolve("builtin:smollm2"))
    (tmp_path / "model").symlink_to(whole)

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)

    placement = make_placement(load_base(), rank=6)  # a multiple of tp
    options = {"learning_rate": 1e-3}
    _check_layouts(tmp_path, placement, load_base, world_size, layouts, options, adapter_as_one=True)


def _check_layouts(
    directory: Path,
    placement: Placement,
    load_base: Callable[[], Any],
    world_size: int,
    layouts: dict[str, dict[str, Any]],
    more: dict[str, Any],
    *,
    adapter_as_one: bool = False,
) -> None:
    placement.source.to_file(directory / "scores.json")
    placement.to_file(directory / "placement.json")
    expected = {
        "given": run_grpo(directory, "given", train={**GIVEN, **more}),
        "sampled": run_grpo(directory, "sampled", sampler="model", train={**SAMPLED, **more}),
    }
    assert len({len(ids) for ids in expected["given"]["sampled"].values()}) > 3
    ranks = run_ranks(world_size, _run, str(directory), layouts, more, timeout_s=1500)
    for name in layouts:
        for kind, whole in expected.items():
            tokens: dict[tuple[int, int], list[int]] = {}
            for found in ranks:
                check_equal(found[f"{name}-{kind}"], whole, load_base, adapter_as_one=adapter_as_one)
                tokens |= found[f"{name}-{kind}"]["sampled"]
            assert tokens == whole["sampled"], f"{name}: other tokens than in one process"
