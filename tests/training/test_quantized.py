"""QLoRA: adapters on a quantised base, in one process and at ZeRO-2, are plain PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from tests.backends.hf.quantized.kinds import BNB, KINDS, SIZES, load
from tests.models import random_tokens, save_tiny
from tests.spawn import run_ranks
from tests.training.test_sft import make_config

NF4 = KINDS["nf4-double"].quantization


def quantised_config(root: Path, run: str, **parallel: Any) -> Config:
    config = make_config(root, run, rows=24, train={"method": "sft", "max_steps": 6}, **parallel)
    return parse_config({**config.model_dump(), "model": {**config.model.model_dump(), "quantization": NF4}})


def run_on_rank(rank: int, tree: dict[str, Any]) -> None:
    config = parse_config(tree)
    run_rank(Stages(config), ["score", "place", "train"], lambda kind, **fields: None)


def logits_of(root: Path, adapter: Path) -> Any:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load(root / "model", NF4), str(adapter)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        return model(input_ids=random_tokens(2, 7)).logits


@pytest.mark.slow
def test_a_quantised_base_is_adapted_alike_in_one_process_and_at_zero_2(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", **SIZES)
    one = quantised_config(tmp_path, "one")
    run_rank(Stages(one), ["score", "place", "train"], lambda kind, **fields: None)
    two = quantised_config(tmp_path, "two", backend="deepspeed", dp=2, zero_stage=2)
    run_ranks(2, run_on_rank, two.model_dump())
    base = load(tmp_path / "model", NF4)
    with torch.no_grad():
        plain = base(input_ids=random_tokens(2, 7)).logits
    found = [logits_of(tmp_path, config.run_path / "train" / "adapter") for config in (one, two)]
    assert (found[0] - plain).norm() > 0.01 * plain.norm()
    assert (found[0] - found[1]).norm() < 0.01 * (found[0] - plain).norm()
    for config in (one, two):
        summary = json.loads((config.run_path / "train" / "summary.json").read_text())
        assert summary["held_out_after"] < summary["held_out_before"]
        scores = json.loads((config.run_path / "scores.json").read_text())
        assert scores["model"]["quantization"] == BNB["quant_method"]


@pytest.mark.rare
@pytest.mark.parametrize("parallel", [{}, {"backend": "deepspeed", "dp": 2, "zero_stage": 2}])
def test_the_held_out_loss_of_smollm2_falls_on_nf4(parallel: dict[str, Any], tmp_path: Path) -> None:
    tree = {
        "run_dir": str(tmp_path),
        "model": {"name_or_path": "builtin:smollm2", "dtype": "float32", "quantization": NF4},
        "data": {"path": "builtin:arithmetic", "template": "{question}\n{answer}", "num_samples": 16},
        "parallel": parallel,
        "placement": {"rank": 4, "alpha": 8},
        "train": {"method": "sft", "max_steps": 8, "learning_rate": 2e-3, "micro_batch_size": 2, "eval_samples": 8},
    }
    if parallel:
        run_ranks(2, run_on_rank, tree, timeout_s=380)
    else:
        run_on_rank(0, tree)
    summary = json.loads((tmp_path / "train" / "summary.json").read_text())
    assert summary["held_out_after"] < summary["held_out_before"] - 0.02, summary
    types = [entry["type"] for entry in json.loads((tmp_path / "scores.json").read_text())["types"]]
    assert types[:3] == ["v_proj", "up_proj", "down_proj"]
