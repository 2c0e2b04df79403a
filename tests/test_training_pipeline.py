"""Training in DeepSpeed's pipeline equals plain PEFT in one process."""

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


def _job(rank: int, directory: str, dp: int) -> dict[str, Any]:
    options = {"backend": "deepspeed", "pp": 2, "dp": dp, "train": {"gradient_accumulation_steps": 4 // dp}}
    out: dict[str, Any] = {}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("pipeline", directory, "whole", **options)
        own = seen[0].keys()
        seen.shards = [shard for shard in seen.shards if id(shard.A) in own]
        out["whole"]["gradients"] = gradients_of(seen)
    run_engine("pipeline", directory, "resumed", num_steps=CUT_AFTER, **options)
    out["resumed"] = run_engine("pipeline", directory, "resumed", **options)
    run_engine("pipeline", directory, "zero1", num_steps=CUT_AFTER, **options, zero_stage=1)
    out["zero1"] = run_engine("pipeline", directory, "zero1", **options, zero_stage=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_pp2_equals_one_process(tmp_path: Path, dp: int) -> None:
    expected = prepare(tmp_path, "qwen3")
    ranks = run_ranks(2 * dp, _job, str(tmp_path), dp)
    adapted = set()
    for found in ranks:
        for name in ("whole", "resumed", "zero1"):
            check_run(expected, found[name], tmp_path, "qwen3")
        assert [record["step"] for record in found["resumed"]["records"]] == RESUMED_STEPS
        adapted |= found["whole"]["gradients"][0].keys()
    assert adapted == expected["adapters"].keys()
