"""AutoTP training equals plain PEFT in one process: losses, gradients, adapters, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.spawn import run_ranks
from tests.training_cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    check_run,
    gradients_of,
    prepare,
    recorded_gradients,
    run_engine,
)


def _job(rank: int, directory: str, tp: int, dp: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    options = {"backend": "deepspeed", "tp": tp, "dp": dp, "train": {"gradient_accumulation_steps": 4 // dp}}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("autotp", directory, f"whole-{dp}", **options)
        out["whole"]["gradients"] = gradients_of(seen)
    run_engine("autotp", directory, f"resumed-{dp}", num_steps=CUT_AFTER, **options)
    out["resumed"] = run_engine("autotp", directory, f"resumed-{dp}", **options)
    if dp > 1:
        out["zero1"] = run_engine("autotp", directory, "zero1", **options, zero_stage=1)
        run_engine("autotp", directory, "zero1-resumed", num_steps=CUT_AFTER, **options, zero_stage=1)
        out["zero1_resumed"] = run_engine("autotp", directory, "zero1-resumed", **options, zero_stage=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2)])
def test_equals_one_process(tmp_path: Path, tp: int, dp: int) -> None:
    expected = prepare(tmp_path, "llama")
    ranks = run_ranks(tp * dp, _job, str(tmp_path), tp, dp)
    for found in ranks:
        check_run(expected, found["whole"], tmp_path, "llama")
    found = ranks[0]
    assert [record["step"] for record in found["resumed"]["records"]] == RESUMED_STEPS
    check_run(expected, found["resumed"], tmp_path, "llama")
    if dp > 1:
        check_run(expected, found["zero1"], tmp_path, "llama")
        check_run(expected, found["zero1_resumed"], tmp_path, "llama")
