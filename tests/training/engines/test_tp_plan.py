"""Training under transformers' own tensor parallelism equals plain PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


def _job(rank: int, directory: str, dp: int) -> dict[str, Any]:
    options = {"backend": "transformers", "tp": 2, "dp": dp, "train": {"gradient_accumulation_steps": 4 // dp}}
    out: dict[str, Any] = {}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("tp_plan", directory, "whole", **options)
        out["whole"]["gradients"] = gradients_of(seen)
    run_engine("tp_plan", directory, "resumed", num_steps=CUT_AFTER, **options)
    out["resumed"] = run_engine("tp_plan", directory, "resumed", **options)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_tp2_equals_one_process(tmp_path: Path, dp: int) -> None:
    expected = prepare(tmp_path, "qwen2")
    for found in run_ranks(2 * dp, _job, str(tmp_path), dp):
        check_run(expected, found["whole"], tmp_path, "qwen2")
        check_run(expected, found["resumed"], tmp_path, "qwen2")
        assert [record["step"] for record in found["resumed"]["records"]] == RESUMED_STEPS
        assert [len(gradients) for gradients in found["whole"]["gradients"]] == [12] * 10
