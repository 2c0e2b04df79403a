"""GRPO in one process: whole runs equal TRL's, resume changes nothing, rewards that fail are named and lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import save_tiny, tiny
from tests.training.cases import make_placement
from tests.training.grpo.cases import NUM_STEPS, check_equal, run_grpo


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("train", [{"num_iterations": 2, "beta": 0.05}, {"loss_type": "bnpo", "temperature": 0.7}])
def test_a_run_that_was_cut_off_ends_like_a_whole_one(directory: Path, train: dict[str, Any]) -> None:
    options = {"train": train, "sampler": "model"}
    whole = run_grpo(directory, "whole", **options)
    assert [entry["step"] for entry in whole["entries"]] == list(range(1, NUM_STEPS + 1))
    run_grpo(directory, "cut", num_steps=4, **options)
    resumed = run_grpo(directory, "cut", **options)
    assert [entry["step"] for entry in resumed["entries"]] == [3, 4, 5]
    check_equal(resumed, whole, directory, "llama")
