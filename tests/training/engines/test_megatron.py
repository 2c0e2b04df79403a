"""Training in Megatron equals plain PEFT in one process, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.training.cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    check_run,
    gradients_of,
    prepare,
    recorded_gradients,
    run_engine,
)

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2_sp": {"tp": 2, "sequence_parallel": True}},
    4: {
        "tp2_dp2": {"tp": 2, "dp": 2},
        "pp2_dp2": {"pp": 2, "dp": 2},
        "tp2_pp2": {"tp": 2, "pp": 2},
        "tp2_sp_dp2": {"tp": 2, "dp": 2, "sequence_parallel": True},
    },
}


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
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_equals_one_process(tmp_path: Path, world_size: int) -> None:
    expected = prepare(tmp_path, "llama")
    ranks = run_ranks(world_size, _job, str(tmp_path), world_size)
    for name in LAYOUTS[world_size]:
        adapted = set()
        for found in ranks:
            check_run(expected, found[name], tmp_path, "llama")
            adapted |= found[name]["gradients"][0].keys()
        assert adapted == expected["adapters"].keys()
    check_run(expected, ranks[0]["resumed"], tmp_path, "llama")
    assert [record["step"] for record in ranks[0]["resumed"]["records"]] == RESUMED_STEPS
