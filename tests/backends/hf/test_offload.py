"""Weights that accelerate keeps on disk are scored as those in memory, and read once for each forward pass."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils.offload import OffloadedWeightsLoader
from torch import nn

import plop_dist
from plop_dist.backends.hf.load import load_model
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import ModelConfig
from plop_dist.values.scores import Scores
from tests.cli.cases import assert_one_message, modules_of, write_case
from tests.cli.cases import plop_dist as command
from tests.models import random_tokens, save_tiny

BATCHES = [{"input_ids": random_tokens(2, 9, seed=1)}, {"input_ids": random_tokens(1, 5, seed=2)}]


def figures(scores: Scores) -> dict[str, tuple[float, float]]:
    return {module.fqn: (module.gain, module.baseline) for module in scores.modules}


def near(scores: Scores) -> dict[str, Any]:
    return {fqn: pytest.approx(pair, rel=1e-6) for fqn, pair in figures(scores).items()}


def in_memory_and_on_disk(folder: Path) -> tuple[Any, Any]:
    """Return the model twice, once with its layers on disk."""
    there: Any = load_model(ModelConfig(name_or_path=str(folder), dtype="float32"))
    base = there.base_model_prefix
    device_map = {
        f"{base}.{name}": "disk" if isinstance(child, nn.ModuleList) else "cpu"
        for name, child in getattr(there, base).named_children()
    }
    device_map |= {name: "cpu" for name, _ in there.named_children() if name != base}
    placed = {"device_map": device_map, "offload_folder": str(folder / "offloaded")}
    away = load_model(ModelConfig(name_or_path=str(folder), dtype="float32", **placed))
    assert sum(parameter.is_meta for parameter in away.parameters()) > 8
    return there, away


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2", "qwen3_moe", "mixtral", "gpt_oss", "mamba"])
def test_weights_on_disk_are_scored_as_those_in_memory(family: str, tmp_path: Path) -> None:
    there, away = in_memory_and_on_disk(save_tiny(family, tmp_path))
    expected, found = (plop_dist.score(model, BATCHES, num_directions=8) for model in (there, away))
    assert figures(found) == near(expected)
    assert found.model.num_parameters == expected.model.num_parameters
    assert figures(plop_dist.score(away, BATCHES, num_directions=8)) == near(expected)  # nothing was left behind


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [["lm_head"], []])
def test_a_pass_reads_each_weight_once(exclude: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, away = in_memory_and_on_disk(save_tiny("qwen3_moe", tmp_path))
    reads: Counter[str] = Counter()
    plain = OffloadedWeightsLoader.__getitem__

    def read(self: Any, name: str) -> Any:
        reads[name] += 1
        return plain(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", read)
    for batches in (BATCHES[:1], BATCHES):
        reads.clear()
        plop_dist.score(away, batches, num_directions=8, exclude=exclude)
        scored = {name for name in reads if "layers" in name}
        assert len(scored) > 20
        assert {name: reads[name] for name in scored if reads[name] != len(batches)} == {}


def test_a_weight_that_no_pass_has_brought_is_fetched(tmp_path: Path) -> None:
    there, away = in_memory_and_on_disk(save_tiny("llama", tmp_path))
    for site, other in zip(whole_model(there, True).sites, whole_model(away, True).sites, strict=True):
        with site.weights() as expected, other.weights() as found:
            assert all((a.weight.dense() == b.weight.dense()).all() for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["model.max_memory={cpu: 1MB}", "train.method=sft"], ["model.max_memory is given, but train.method is sft"]),
        (["model.device_map=auto", "parallel.dp=2"], ["model.device_map is given", "is transformers with 2"]),
        (["model.device_map=gpu"], ["model.device_map: expected auto, balanced"]),
        (["model.max_memory={gpu: 1MB}"], ["model.max_memory: expected the numbers of GPUs, cpu and disk"]),
        (["model.max_memory={cpu: lots}"], ["model.max_memory: expected a size"]),
        (["model.offload_folder=x"], ["model.offload_folder is given without model.max_memory"]),
        (["model.max_memory={cpu: 1MB}", "model.checkpoint=x"], ["model.checkpoint is read into memory"]),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(keys: list[str], parts: list[str], tmp_path: Path) -> None:
    config = write_case(tmp_path, save_tiny("llama", tmp_path / "model"), data={"num_samples": 4})
    assert_one_message(command("check", config, *keys), *parts)


@pytest.mark.slow
def test_the_command_line_keeps_what_fits_and_says_what_it_reads(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", shard_size="40KB")
    config = write_case(tmp_path, model, data={"num_samples": 5})
    assert command("score", config).status == 0
    expected = modules_of(tmp_path / "run")
    away = ["model.max_memory={cpu: 250KB}", f"run_dir={tmp_path}/away"]
    assert command("score", config, *away).status == 0
    found = modules_of(tmp_path / "away")
    assert [(one["fqn"], one["nfn"]) for one in found] == [
        (one["fqn"], pytest.approx(one["nfn"], rel=1e-6)) for one in expected
    ]
    shown = command("check", config, *away).out
    assert re.search(r"read 3 times \(data\.num_samples / data\.batch_size\)", shown), shown


@pytest.mark.rare
def test_smollm2_below_its_own_size(tmp_path: Path) -> None:
    """At 160 MB of 513: the same scores, 150 MB less at the peak, less than four times as long."""
    script = (
        "import sys; from plop_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line])"
    )
    arguments = ["score", str(tmp_path / "config.yaml")]
    fields = {
        "model": {"name_or_path": "builtin:smollm2", "dtype": "float32"},
        "data": {"path": "builtin:arithmetic", "template": "{question}\n{answer}", "num_samples": 16, "batch_size": 16},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(fields))
    peaks, seconds, scores = [], [], []
    for run, more in (("whole", []), ("away", ["model.max_memory={cpu: 160MB}"])):
        command_line = [sys.executable, "-c", script, *arguments, f"run_dir={tmp_path / run}", *more]
        done = subprocess.run(command_line, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(int(re.findall(r"VmHWM:\D*(\d+) kB", done.stdout)[0]) / 1e3)
        found = json.loads((tmp_path / run / "scores.json").read_text())
        seconds.append(sum(found["timing"][name] for name in ("baseline_seconds", "forward_seconds")))
        scores.append([(one["fqn"], one["nfn"]) for one in found["modules"]])
    assert [fqn for fqn, _ in scores[0]] == [fqn for fqn, _ in scores[1]]
    assert all(math.isclose(one, other, rel_tol=1e-6) for (_, one), (_, other) in zip(*scores, strict=True))
    assert peaks[1] < peaks[0] - 150, peaks
    assert seconds[1] < 4 * seconds[0], seconds
