"""Completions of a vLLM server, which a simulated one stands in for: adapters, importance weights, what fails."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.errors import ConfigError
from plop_dist.training.grpo.rollout import importance_weights
from tests.models import save_tiny, tiny
from tests.training.cases import make_placement
from tests.training.grpo.cases import run_grpo
from tests.training.grpo.vllm_stand_in import StandIn, serving

TRAIN = {"max_steps": 3, "gradient_accumulation_steps": 1, "max_completion_length": 4, "save_steps": 10}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    return tmp_path


def _run(directory: Path, server: StandIn, run: str = "run", **train: Any) -> dict[str, Any]:
    vllm = {"url": server.url, "timeout_s": 5}
    return run_grpo(directory, run, sampler="vllm", train={**TRAIN, "vllm": vllm, **train})


@pytest.mark.slow
def test_the_server_gets_each_steps_adapter_and_agrees_with_the_trainer(directory: Path) -> None:
    with serving(StandIn(directory / "model", processed=True)) as server:
        found = _run(directory, server, temperature=0.8, num_iterations=1)
    assert [entry["step"] for entry in found["entries"]] == [1, 2, 3]
    for entry in found["entries"]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert entry["grad_norm"] > 0
    loads = [line.partition(" ")[::2] for line in server.history]
    names = [name for kind, name in loads if kind == "load"]
    assert [name.partition("-")[2] for name in names] == ["check", "step-0", "step-1", "step-2"]
    assert [name for kind, name in loads if kind == "unload"] == names
    assert not server.loaded
    with serving(StandIn(directory / "model", processed=True)) as server:
        again = _run(directory, server, "again", temperature=0.8)
    assert again["sampled"] == found["sampled"]


@pytest.mark.slow
def test_a_server_that_answers_for_another_policy_shows_in_the_log(directory: Path) -> None:
    with serving(StandIn(directory / "model", off_by=-0.125)) as server:
        found = _run(directory, server, max_steps=1)
    [entry] = found["entries"]
    for end in ("mean", "max"):
        assert entry[f"sampling/sampling_logp_difference/{end}"] == pytest.approx(0.125, abs=1e-4)
    weights = sorted(math.exp(0.125 * len(ids)) for ids in found["sampled"].values())
    for end, expected in {"min": weights[0], "mean": sum(weights) / len(weights), "max": weights[-1]}.items():
        assert entry[f"sampling/importance_sampling_ratio/{end}"] == pytest.approx(expected, rel=1e-3)


def test_importance_weights_are_trls() -> None:
    difference = torch.tensor([[0.1, -0.3, 0.0], [1.0, 0.5, 0.0], [-2.0, -3.0, -4.0]])
    expected = torch.exp(torch.tensor([-0.2, 1.5, -9.0]))
    expected[1] = 0  # exp(1.5) is above 3
    torch.testing.assert_close(importance_weights(difference), expected[:, None].expand(3, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "train", "message"),
    [
        ({"updates_adapters": False}, {}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"max_lora_rank": 2}, {}, "LoRA rank 4 is greater than max_lora_rank 2"),
        ({}, {"temperature": 0.5}, "start it with --logprobs-mode processed_logprobs"),
    ],
)
def test_what_the_server_cannot_do_is_named_before_the_first_step(
    directory: Path, server: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    running = StandIn(directory / "model", **server)
    with serving(running), pytest.raises(ConfigError, match=re.escape(message)):
        _run(directory, running, **train)
    assert not (directory / "run" / "train" / "checkpoints").exists()


@pytest.mark.slow
def test_a_server_that_dies_is_named_in_time_and_loses_no_step(directory: Path) -> None:
    # one completion to check, four for the first step
    with serving(StandIn(directory / "model", completions_left=6)) as server:
        began = time.perf_counter()
        with pytest.raises(
            ConfigError, match=r"has not answered within train.vllm.timeout_s \(5 s\).*run again to go on"
        ):
            _run(directory, server)
    assert time.perf_counter() - began < 60
    with serving(StandIn(directory / "model")) as server:
        resumed = _run(directory, server)
    assert [entry["step"] for entry in resumed["entries"]] == [2, 3]
