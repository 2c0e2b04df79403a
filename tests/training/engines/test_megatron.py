"""Training in Megatron equals plain PEFT in one process, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plop_dist.errors import PlacementError
from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.te_on_cpu.install import needs_te, specified
from tests.training.cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    check_run,
    gradients_of,
    prepare,
    recorded_gradients,
    run_engine,
)

GEMMA3 = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
          "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}  # fmt: skip
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2_sp": {"tp": 2, "sequence_parallel": True}},
    4: {
        "tp2_dp2": {"tp": 2, "dp": 2},
        "pp2_dp2": {"pp": 2, "dp": 2},
        "tp2_pp2": {"tp": 2, "pp": 2},
        "tp2_sp_dp2": {"tp": 2, "dp": 2, "sequence_parallel": True},
    },
}

CASES = [
    (2, "local"), (4, "local"), pytest.param(2, "transformer_engine", marks=needs_te),
    pytest.param(4, "transformer_engine", marks=[needs_te, pytest.mark.rare]),
]  # fmt: skip


def _job(rank: int, directory: str, world_size: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    out: dict[str, Any] = {}
    for name, layout in LAYOUTS[world_size].items():
        accumulation = {"gradient_accumulation_steps": 4 // layout.get("dp", 1)}
        options = {"backend": "megatron", "train": accumulation, **layout}
        with recorded_gradients() as seen:
            out[name] = run_engine("megatron", directory, name, **options)
            out[name]["gradients"] = gradients_of(seen)
        parallel_state.destroy_model_parallel()
    layout = {"tp": 2, "pp": 2} if world_size == 4 else {"tp": 2}
    options = {"backend": "megatron", **layout, "train": {"gradient_accumulation_steps": 4}}
    run_engine("megatron", directory, "resumed", num_steps=CUT_AFTER, **options)
    parallel_state.destroy_model_parallel()
    out["resumed"] = run_engine("megatron", directory, "resumed", **options)
    return out


@needs_bridge
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "specification"), CASES)
def test_every_layout_equals_one_process(tmp_path: Path, world_size: int, specification: str) -> None:
    expected = prepare(tmp_path, "llama")
    ranks = run_ranks(world_size, specified, specification, _job, str(tmp_path), world_size)
    for name in LAYOUTS[world_size]:
        adapted = set()
        for found in ranks:
            check_run(expected, found[name], tmp_path, "llama")
            adapted |= found[name]["gradients"][0].keys()
        assert adapted == expected["adapters"].keys()
    check_run(expected, ranks[0]["resumed"], tmp_path, "llama")
    assert [record["step"] for record in ranks[0]["resumed"]["records"]] == RESUMED_STEPS


def _behind_a_norm(rank: int, directory: str) -> str:
    with pytest.raises(PlacementError) as caught:
        run_engine("megatron", directory, "refused", backend="megatron")
    return str(caught.value)


@needs_bridge
@needs_te
@pytest.mark.slow
def test_adapters_that_bridge_adds_behind_a_norm_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, "gemma3_text", ("o_proj",), **GEMMA3)
    (message,) = run_ranks(1, specified, "transformer_engine", _behind_a_norm, str(tmp_path))
    assert "linear_proj' is a TERowParallelLinearLayerNorm: its norm comes after the projection" in message
    assert "placement.exclude" in message
