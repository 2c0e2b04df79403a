"""A rank of a layout holds its share of the model and little more, while it loads and while it scores."""

from __future__ import annotations

import importlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.config.loading import parse_config
from plop_dist.launch.rank import run_rank
from plop_dist.registry import BACKENDS, import_package, load
from plop_dist.rundir.stages import Stages
from tests.models import save_tiny
from tests.spawn import run_ranks

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 8}  # fmt: skip
LARGEST = 1024 * 2816
SLACK = 24 << 20  # activations, directions, threads
LAYOUTS = {
    "tp_plan": {"tp": 2},
    "autotp": {"backend": "deepspeed", "tp": 2},
    "pipeline": {"backend": "deepspeed", "pp": 2},
    "zero3": {"backend": "deepspeed", "dp": 2, "zero_stage": 3},
    "megatron-tp": {"backend": "megatron", "tp": 2},
    "megatron-pp": {"backend": "megatron", "pp": 2},
}


def anonymous() -> int:
    """Return this process's anonymous resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def peak_on_rank(rank: int, tree: dict[str, Any]) -> int:
    """Return by how much a rank grew at the most, from before it loaded the model until it was scored."""
    config = parse_config(tree)
    record = load(BACKENDS, config.parallel.backend)
    kind, plain = type(record), type(record).load
    if config.parallel.backend != "transformers":  # what a framework's own modules take is not the model's
        import_package({"megatron": "megatron.bridge", "deepspeed": "deepspeed"}[config.parallel.backend])
        importlib.import_module("torch._inductor.compile_fx")  # by deepspeed.initialize, for bfloat16
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.append(anonymous())
            time.sleep(0.002)

    def watched(self: Any, config: Any) -> Any:
        seen.append(anonymous())
        threading.Thread(target=watch, daemon=True).start()
        return plain(self, config)

    kind.load = watched
    run_rank(Stages(config), ["score"], lambda kind, **fields: None)
    ended.set()
    return max(seen) - seen[0]


@pytest.mark.rare
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_little_more_than_its_share(layout: str, dtype: str, tmp_path: Path) -> None:
    if layout.startswith("megatron"):
        pytest.importorskip("megatron.core", reason="Megatron needs Python 3.12")
    model = save_tiny("llama", tmp_path / "model", **SIZES)
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    share = (model / "model.safetensors").stat().st_size // 4 * size // 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "the cat in the hat " * 3}) + "\n" for _ in range(4)))
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(model), "dtype": dtype},
        "data": {"path": str(rows), "text_field": "text", "num_samples": 4, "batch_size": 2},
        "parallel": LAYOUTS[layout],
    }
    peaks = run_ranks(2, peak_on_rank, tree, timeout_s=200)
    assert max(peaks) <= 1.3 * share + LARGEST * size + SLACK, [peak / share for peak in peaks]
