"""The real model, end to end in one process: score, place, export, train, report, through the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.launch import pipeline

pytestmark = pytest.mark.slow


def config_for(run_dir: Path, **data: object) -> Config:
    return parse_config(
        {
            "run_dir": str(run_dir),
            "model": {"name_or_path": "builtin:smollm2", "dtype": "float32"},
            "data": {"path": "builtin:arithmetic", "num_samples": 16, "max_length": 96, **data},
            "placement": {"rank": 4, "alpha": 8},
        }
    )


def gains_of(run_dir: Path) -> dict[str, float]:
    return {module["fqn"]: module["gain"] for module in json.loads((run_dir / "scores.json").read_text())["modules"]}


def test_the_batching_of_a_real_model_does_not_change_its_scores(tmp_path: Path) -> None:
    pipeline.score(config_for(tmp_path / "one", batch_size=1), "test")
    pipeline.score(config_for(tmp_path / "left", batch_size=8, padding_side="left"), "test")
    one, left = gains_of(tmp_path / "one"), gains_of(tmp_path / "left")
    assert len(one) == 210
    assert left == pytest.approx(one, rel=1e-5)
    types = [entry["type"] for entry in json.loads((tmp_path / "one" / "scores.json").read_text())["types"]]
    assert types[:3] == ["v_proj", "up_proj", "down_proj"]


def test_a_run_trains_exactly_the_chosen_modules_and_reports(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from plop_dist.checkpoints.builtin import resolve

    config = config_for(tmp_path, template="{question}\n{answer}")
    train = {"method": "sft", "max_steps": 4, "learning_rate": 2e-3, "micro_batch_size": 2, "max_length": 64}
    config = parse_config({**config.model_dump(), "train": {**train, "eval_samples": 4}})
    report = pipeline.run(config, "plop-dist run test.yaml").report
    assert report.stat().st_size > 100_000
    summary = json.loads((tmp_path / "train" / "summary.json").read_text())
    assert summary["held_out_after"] < summary["held_out_before"]
    placement = json.loads((tmp_path / "placement.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(resolve("builtin:smollm2"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "train" / "adapter"))
    names = {
        name.removeprefix("base_model.model.") for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    assert names == set(placement["modules"])
