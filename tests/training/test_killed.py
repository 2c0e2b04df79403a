"""A worker killed while an engine trains: the run comes back and ends where the uninterrupted one ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plop_dist.config.loading import load_config
from plop_dist.launch import pipeline
from plop_dist.rundir.stages import Stages
from plop_dist.training.grpo.metrics import is_metric
from tests.installed import needs_bridge
from tests.launch.cluster_case import BIN, Case, environment, events, make_case, session
from tests.launch.ray_head import Head, kill_rank_1_in_the_middle, ray_head
from tests.spawn import run_ranks

SFT = {"method": "sft", "max_steps": 40, "learning_rate": 1e-2, "micro_batch_size": 2, "max_length": 48,
       "eval_samples": 8, "save_steps": 8, "lora_dropout": 0.1}  # fmt: skip
GRPO = {**SFT, "method": "grpo", "max_steps": 12, "save_steps": 4, "micro_batch_size": 4, "num_generations": 4,
        "max_completion_length": 6, "rewards": ["tests.training.test_killed:variety"]}  # fmt: skip
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero2": ({"backend": "deepspeed", "dp": 2, "zero_stage": 2}, SFT),
    "zero3": ({"backend": "deepspeed", "dp": 2, "zero_stage": 3}, SFT),
    "autotp": ({"backend": "deepspeed", "dp": 1, "tp": 2, "zero_stage": 0}, SFT),
    "pipeline": ({"backend": "deepspeed", "dp": 1, "pp": 2, "zero_stage": 0}, SFT),
    "hf_tp": ({"backend": "transformers", "dp": 1, "tp": 2, "zero_stage": 0}, SFT),
    "megatron": ({"backend": "megatron", "dp": 1, "tp": 2, "zero_stage": 0}, SFT),
    "grpo": ({"backend": "deepspeed", "dp": 2, "zero_stage": 2}, GRPO),
    "grpo_autotp": ({"backend": "deepspeed", "dp": 1, "tp": 2, "zero_stage": 0}, {**GRPO, "num_iterations": 3}),
    "grpo_megatron": (
        {"backend": "megatron", "dp": 1, "pp": 2, "zero_stage": 0},
        {**GRPO, "num_iterations": 3, "beta": 0.05},
    ),
}
# One engine of each kind of loop; ZeRO-3 is killed in test_cluster.py.
STANDING = ("autotp", "megatron", "grpo")


def variety(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between completions: how many different characters each has."""
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:
        yield running


def _train(rank: int, config: str) -> None:
    pipeline.launch(Stages(load_config(config)), ["score", "place", "train"], "plop-dist run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            name,
            marks=[needs_bridge] * ("megatron" in name) + [pytest.mark.rare] * (name not in STANDING),
        )
        for name in ENGINES
    ],
)
def test_a_worker_killed_in_training_changes_nothing(case: Case, head: Head, engine: str) -> None:
    parallel, train = ENGINES[engine]
    sections: dict[str, Any] = {"parallel": parallel, "train": train, "data": {"num_samples": 8, "batch_size": 8}}
    run_ranks(2, _train, str(case.write(f"{engine}-whole", **sections)))

    config = case.write(f"{engine}-killed", **sections, cluster={"address": head.address})
    run_dir = case.directory / f"{engine}-killed"
    with session([str(BIN / "plop-dist"), "run", str(config)], environment()) as process:
        kill_rank_1_in_the_middle(run_dir, "training", train["save_steps"] + 1, process)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    seen = events(run_dir)
    assert [e["attempt"] for e in seen if e["event"] == "worker" and e["rank"] == 1] == [1, 2]
    assert re.search(r"rank 1 on .*: its process died .*; the workers are restarted, 1 of 1 times", err), err
    steps = [e["done"] for e in seen if e["event"] == "training"]
    assert steps.count(1) == 1, f"training began again from the first step: {steps}"
    assert steps != sorted(set(steps)), "no step was run again"

    whole, killed = (_Trained(case.directory / f"{engine}-{name}") for name in ("whole", "killed"))
    assert killed.steps == whole.steps == list(range(1, train["max_steps"] + 1))
    metrics = [key for key in whole.log[-1] if key == "reward" or is_metric(key)]
    assert metrics if train["method"] == "grpo" else set(metrics) <= {"entropy"}  # which TRL logs of sft too
    for key in ("loss", "grad_norm", "learning_rate", *metrics):
        assert killed.by_step(key) == pytest.approx(whole.by_step(key), rel=1e-4, abs=1e-6), key
    for key in ("held_out_before", "held_out_after") if train["method"] == "sft" else ():
        assert killed.summary[key] == pytest.approx(whole.summary[key], abs=1e-4)
    assert killed.adapter.keys() == whole.adapter.keys()
    for name, weight in whole.adapter.items():
        torch.testing.assert_close(killed.adapter[name], weight, rtol=1e-4, atol=1e-5)


class _Trained:
    """What a finished training left: log entries, summary, adapter."""

    def __init__(self, run_dir: Path) -> None:
        directory = run_dir / "train"
        self.log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        self.steps = [entry["step"] for entry in self.log]
        self.summary = json.loads((directory / "summary.json").read_text())
        self.adapter = load_file(directory / "adapter" / "adapter_model.safetensors")

    def by_step(self, key: str) -> dict[int, float]:
        """Return the value logged of each step."""
        return {entry["step"]: entry[key] for entry in self.log}
