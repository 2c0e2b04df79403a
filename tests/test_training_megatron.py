"""Training in Megatron equals plain PEFT in one process, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.spawn import run_ranks
from tests.training_cases import assert_equal, check_run, gradients_of, prepare, recorded_gradients, run_engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_dp2": {"tp": 2, "dp": 2},
    "pp2_dp2": {"pp": 2, "dp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_sp_dp2": {"tp": 2, "dp": 2, "sequence_parallel": True},
}


def _job(rank: int, directory: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    out: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        accumulation = {"gradient_accumulation_steps": 4 // layout.get("dp", 1)}
        options = {"backend": "megatron", "train": accumulation, **layout}
        with recorded_gradients() as seen:
            out[name] = run_engine("megatron", directory, name, **options)
            out[name]["gradients"] = gradients_of(seen)
        parallel_state.destroy_model_parallel()
    options = {"backend": "megatron", "tp": 2, "pp": 2, "train": {"gradient_accumulation_steps": 4}}
    run_engine("megatron", directory, "resumed", num_steps=3, **options)
    parallel_state.destroy_model_parallel()
    out["resumed"] = run_engine("megatron", directory, "resumed", **options)
    return out


@pytest.mark.slow
def test_every_layout_equals_one_process(tmp_path: Path) -> None:
    expected = prepare(tmp_path, "llama")
    ranks = run_ranks(4, _job, str(tmp_path))
    for name in LAYOUTS:
        adapted = set()
        for found in ranks:
            check_run(expected, found[name], tmp_path, "llama")
            for step, gradients in enumerate(found[name]["gradients"]):
                adapted |= gradients.keys()
                for key, gradient in gradients.items():
                    assert_equal(f"{name} step {step} {key}", gradient, expected["gradients"][step][key])
        assert adapted == expected["adapters"].keys()
    check_run(expected, ranks[0]["resumed"], tmp_path, "llama")
    assert [record["step"] for record in ranks[0]["resumed"]["records"]] == [3, 4]
