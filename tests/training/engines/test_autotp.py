"""AutoTP training equals plain PEFT in one process: losses, gradients, adapters, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plop_dist.training.adapters.tensor_parallel import TensorParallelLoRA
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


def _job(rank: int, directory: str, tp: int, dp: int) -> dict[str, Any]:
    out: dict[str, Any] = {"rng": _rng_after_dropout(rank) if dp == 1 else None}
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


def _rng_after_dropout(rank: int) -> torch.Tensor:
    """Return the random state after an adapter has dropped out of a row-parallel input of unequal shards."""
    sizes = (3, 5)
    base = torch.nn.Linear(sizes[rank], 4, bias=False)
    lora = TensorParallelLoRA(base, "x", "row", sizes, dist.group.WORLD, rank=2, scaling=1.0, dropout=0.5)
    torch.manual_seed(1)
    lora(torch.ones(2, 3, sizes[rank]))
    return torch.get_rng_state()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2)])
def test_equals_one_process(tmp_path: Path, tp: int, dp: int) -> None:
    expected = prepare(tmp_path, "llama")
    ranks = run_ranks(tp * dp, _job, str(tmp_path), tp, dp)
    for found in ranks:
        check_run(expected, found["whole"], tmp_path, "llama")
        if dp == 1:
            assert torch.equal(found["rng"], ranks[0]["rng"]), "the next dropout would differ between the ranks"
    found = ranks[0]
    assert [record["step"] for record in found["resumed"]["records"]] == RESUMED_STEPS
    check_run(expected, found["resumed"], tmp_path, "llama")
    if dp > 1:
        check_run(expected, found["zero1"], tmp_path, "llama")
        check_run(expected, found["zero1_resumed"], tmp_path, "llama")
