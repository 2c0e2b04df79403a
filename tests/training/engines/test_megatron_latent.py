"""Adapters on latent attention (MLA) in Megatron: every gradient is that of one process, replicated linears or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.te_on_cpu.install import each_specification, each_specification_rarely, specified
from tests.training.cases import check_run, gradients_of, prepare, recorded_gradients, run_engine

pytestmark = [pytest.mark.slow, needs_bridge]
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16, "head_dim": 4,
}  # fmt: skip
# Replicated, column- and row-parallel ones; the last lies behind those whose backward pass must be right.
TYPES = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# AdamW makes large steps of small gradients, roundings included; in ten small steps these have no room to grow.
SMALL_STEPS = {"learning_rate": 1e-4}
LAYOUTS: dict[str, dict[str, Any]] = {"tp2_sp": {"tp": 2, "sequence_parallel": True}}


def _job(rank: int, directory: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from megatron.core import parallel_state

    out: dict[str, Any] = {}
    for name, layout in layouts.items():
        train = {"gradient_accumulation_steps": 4 // layout.get("dp", 1), **SMALL_STEPS}
        with recorded_gradients() as seen:
            out[name] = run_engine("megatron", directory, name, backend="megatron", train=train, **layout)
            out[name]["gradients"] = gradients_of(seen)
        parallel_state.destroy_model_parallel()
    return out


def _check(directory: Path, specification: str, layouts: dict[str, dict[str, Any]], **overrides: Any) -> None:
    fields = {**DEEPSEEK, **overrides}
    expected = prepare(directory, "deepseek_v3", TYPES, SMALL_STEPS, **fields)
    for found in run_ranks(2, specified, specification, _job, str(directory), layouts):
        for name in layouts:
            assert found[name]["gradients"][0].keys() == expected["adapters"].keys()
            del found[name]["gradients"][4:]
            check_run(expected, found[name], directory, "deepseek_v3", **fields)


@each_specification
def test_every_gradient_is_that_of_one_process(tmp_path: Path, specification: str) -> None:
    _check(tmp_path, specification, LAYOUTS)


@each_specification_rarely
def test_every_gradient_is_that_of_one_process_without_experts_and_sequence_parallelism(
    tmp_path: Path, specification: str
) -> None:
    _check(tmp_path, specification, {"tp2": {"tp": 2}}, first_k_dense_replace=3)
