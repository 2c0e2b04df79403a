"""Training in DeepSpeed's pipeline equals plain PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.backends.deepspeed.pipeline import load_stage
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    check_run,
    gradients_of,
    make_config,
    make_placement,
    prepare,
    recorded_gradients,
    run_engine,
)


def _job(rank: int, directory: str, dp: int) -> dict[str, Any]:
    options = {"backend": "deepspeed", "pp": 2, "dp": dp, "train": {"gradient_accumulation_steps": 4 // dp}}
    out: dict[str, Any] = {}
    with recorded_gradients() as seen:
        out["whole"] = run_engine("pipeline", directory, "whole", **options)
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


def _held(rank: int, directory: str) -> set[str]:
    from plop_dist.backends.hf.load import meta_model
    from plop_dist.training.engines.pipeline import PipelineEngine

    loaded: list[torch.nn.Module] = []
    config = make_config(directory, directory, backend="deepspeed", pp=2)

    def load(config: Any) -> Any:
        model, options = load_stage(config)
        loaded.append(model)
        return model, options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plop_dist.training.engines.pipeline.load_stage", load)
        PipelineEngine(config, make_placement(meta_model(config.model))).close()
    return {name for name, parameter in loaded[0].named_parameters() if not parameter.is_meta and ".lora_" not in name}


@pytest.mark.slow
def test_no_stage_loads_another_stages_layers(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    first, second = run_ranks(2, _held, str(tmp_path))
    layers = {name for name, _ in tiny("qwen3").named_parameters() if ".layers." in name}
    held = [{name.replace(".base_layer", "") for name in stage} & layers for stage in (first, second)]
    assert held[0] | held[1] == layers
    assert not held[0] & held[1]
