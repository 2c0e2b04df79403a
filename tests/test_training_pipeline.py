"""Training in DeepSpeed's pipeline equals plain PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.spawn import run_ranks
from tests.training_cases import assert_equal, check_run, gradients_of, prepare, recorded_gradients, run_engine


def _job(rank: int, directory: str) -> dict[str, Any]:
    options = {"backend": "deepspeed", "pp": 2, "dp": 2, "train": {"gradient_accumulation_steps": 2}}
    out: dict[str, Any] = {}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("pipeline", directory, "whole", **options)
        own = seen[0].keys()
        seen.shards = [shard for shard in seen.shards if id(shard.A) in own]
        out["gradients"] = gradients_of(seen)
    run_engine("pipeline", directory, "resumed", num_steps=3, **options)
    out["resumed"] = run_engine("pipeline", directory, "resumed", **options)
    run_engine("pipeline", directory, "zero1", num_steps=3, **options, zero_stage=1)
    out["zero1"] = run_engine("pipeline", directory, "zero1", **options, zero_stage=1)
    return out


@pytest.mark.slow
def test_pp2_dp2_equals_one_process(tmp_path: Path) -> None:
    expected = prepare(tmp_path, "qwen3")
    ranks = run_ranks(4, _job, str(tmp_path))
    adapted = set()
    for found in ranks:
        for name in ("whole", "resumed", "zero1"):
            check_run(expected, found[name], tmp_path, "qwen3")
        assert [record["step"] for record in found["resumed"]["records"]] == [3, 4]
        for step, gradients in enumerate(found["gradients"]):
            adapted |= gradients.keys()
            for name, gradient in gradients.items():
                assert_equal(f"step {step} {name}", gradient, expected["gradients"][step][name])
    assert adapted == expected["adapters"].keys()
