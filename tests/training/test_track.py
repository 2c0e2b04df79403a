"""The NFN of the adapted model along the way: the same in every layout, and without any effect on the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from plop_dist.training.train import train
from plop_dist.values.placement import Placement
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks

ENGINES: dict[str, dict[str, Any]] = {
    "autotp": {"backend": "deepspeed", "tp": 2},
    "pipeline": {"backend": "deepspeed", "pp": 2},
    "hf_tp": {"backend": "transformers", "tp": 2},
    "megatron_tp": {"backend": "megatron", "tp": 2, "sequence_parallel": True},
    "megatron_pp": {"backend": "megatron", "pp": 2},
}
FAMILY = "qwen2"  # its q, k and v have biases, which are no part of a gain


def make_config(directory: Path, run: str, track: bool, **parallel: Any) -> Config:
    """Return a configuration whose adapters sit on column- and row-parallel linears, with dropout."""
    return parse_config(
        {
            "run_dir": str(directory / run),
            "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
            "data": {"path": str(directory / "rows.jsonl"), "text_field": "text", "num_samples": 7, "batch_size": 2},
            "placement": {"include": ["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "k": 5, "rank": 4,
                          "alpha": 8},
            "parallel": parallel,
            "train": {"method": "sft", "max_steps": 4, "learning_rate": 0.05, "micro_batch_size": 2, "eval_samples": 3,
                      "lr_scheduler": "constant", "track_nfn_every": 2 if track else None, "seed": 5},
        }
    )  # fmt: skip


def _trained(directory: Path, run: str, track: bool, **parallel: Any) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    placement = Placement.from_file(directory / "one" / "placement.json")
    train(make_config(directory, run, track, **parallel), placement, log.append)
    return log


def _job(rank: int, directory: str, names: tuple[str, ...]) -> dict[str, list[list[dict[str, Any]]]]:
    out = {}
    for name in names:
        out[name] = []
        for track in (True, False):
            out[name].append(_trained(Path(directory), f"{name}-{track}", track, **ENGINES[name]))
            if name.startswith("megatron"):
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("autotp", "hf_tp", "pipeline"), pytest.param(("megatron_tp", "megatron_pp"), marks=needs_bridge)]
)
def test_tracked_nfn_is_that_of_one_process_and_disturbs_nothing(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_tiny(FAMILY, tmp_path / "model")
    rows = [json.dumps({"text": f"{i} and {7 * i} make {8 * i}" * (1 + i % 3)}) for i in range(19)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    run_rank(Stages(make_config(tmp_path, "one", True)), ["score", "place"], lambda kind, **fields: None)
    expected = {entry["step"]: entry["nfn"] for entry in _trained(tmp_path, "one", True) if "nfn" in entry}
    assert sorted(expected) == [0, 2, 4]
    moved = {name for name, value in expected[4].items() if abs(value / expected[0][name] - 1) > 1e-2}
    assert moved >= {"k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}

    for found in run_ranks(2, _job, str(tmp_path), names):
        for name, (tracked, plain) in found.items():
            nfn = {entry["step"]: entry["nfn"] for entry in tracked if "nfn" in entry}
            assert nfn.keys() == expected.keys()
            for step, values in expected.items():
                assert nfn[step] == pytest.approx(values, rel=1e-5), f"{name} step {step}"
            steps = [entry for entry in tracked if "nfn" not in entry]
            for key in ("step", "loss", "grad_norm"):
                assert [entry[key] for entry in steps] == [entry[key] for entry in plain], f"{name} {key}"
            one, other = (
                load_file(tmp_path / f"{name}-{track}" / "train" / "adapter" / "adapter_model.safetensors")
                for track in (True, False)
            )
            assert all(torch.equal(one[key], other[key]) for key in one), name
