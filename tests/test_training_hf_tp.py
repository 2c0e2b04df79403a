"""Training under transformers' own tensor parallelism equals plain PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.spawn import run_ranks
from tests.training_cases import assert_equal, check_run, gradients_of, prepare, recorded_gradients, run_engine


def _job(rank: int, directory: str) -> dict[str, Any]:
    options = {"backend": "transformers", "tp": 2, "dp": 2, "train": {"gradient_accumulation_steps": 2}}
    out: dict[str, Any] = {}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("hf_tp", directory, "whole", **options)
        out["gradients"] = gradients_of(seen)
    run_engine("hf_tp", directory, "resumed", num_steps=3, **options)
    out["resumed"] = run_engine("hf_tp", directory, "resumed", **options)
    return out


@pytest.mark.slow
def test_tp2_dp2_equals_one_process(tmp_path: Path) -> None:
    expected = prepare(tmp_path, "qwen2")
    for found in run_ranks(4, _job, str(tmp_path)):
        check_run(expected, found["whole"], tmp_path, "qwen2")
        check_run(expected, found["resumed"], tmp_path, "qwen2")
        assert [record["step"] for record in found["resumed"]["records"]] == [3, 4]
        for step, gradients in enumerate(found["gradients"]):
            assert len(gradients) == 12
            for name, gradient in gradients.items():
                assert_equal(f"step {step} {name}", gradient, expected["gradients"][step][name])
