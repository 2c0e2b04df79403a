"""GRPO with a real vLLM server on a CPU: SmolLM2 learns in a pipeline, and what a server lacks or loses is named."""

from __future__ import annotations

import math
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.rundir.training_log import read_log
from plop_dist.training.log import TrainingLog
from plop_dist.training.samplers.vllm_server import VLLMServer
from plop_dist.training.train import train
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import load_placement, make_placement
from tests.training.grpo.cases import run_grpo
from tests.vllm_server import ENVIRONMENT, PYTHON, needs_vllm, vllm_serving

pytestmark = [pytest.mark.rare, needs_vllm]
# vLLM's attention on a CPU has no head of fewer features.
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--max-model-len", "128")
TYPES = ("v_proj", "up_proj", "down_proj")
NUM_UPDATES, NUM_COMPLETIONS = 30, 8


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Rate the share of a completion's characters that are digits: few at first, and easily learnt."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def _config(directory: str | Path, url: str, **parallel: Any) -> Config:
    return parse_config(
        {
            "run_dir": str(Path(directory, "run")),
            "model": {"name_or_path": "builtin:smollm2", "dtype": "float32"},
            "data": {"path": "builtin:arithmetic"},
            "parallel": parallel,
            "train": {
                "method": "grpo", "engine": "plop", "max_steps": NUM_UPDATES, "learning_rate": 2e-3,
                "lr_scheduler": "constant", "micro_batch_size": 4, "gradient_accumulation_steps": 2,
                "num_generations": 4, "max_completion_length": 16, "save_steps": 100, "seed": 3, "beta": 0.01,
                "prompt_template": "{question}\nAnswer:", "answer_field": "number",
                "rewards": ["builtin:number", "tests.training.grpo.test_vllm_real:digits"],
                "vllm": {"url": url, "timeout_s": 200},
            },
        }
    )  # fmt: skip


def _changed(model: torch.nn.Module) -> list[str]:
    """Return the base weights of a stage that are not the checkpoint's."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(resolve("builtin:smollm2"), dtype=torch.float32).state_dict()
    own = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".lora_" not in n and not p.is_meta}
    assert len(own) > 50
    return [name for name, parameter in own.items() if not torch.equal(parameter.detach(), whole[name])]


def _learn(rank: int, directory: str, url: str) -> dict[str, Any]:
    from plop_dist.training.engines.pipeline import PipelineEngine

    changed: list[str] = []
    close = PipelineEngine.close

    def compare_and_close(engine: PipelineEngine) -> None:
        changed.extend(_changed(engine._model))
        close(engine)

    PipelineEngine.close = compare_and_close  # type: ignore[method-assign]
    config = _config(directory, url, backend="deepspeed", pp=2)
    with TrainingLog(config, config.run_path / "train", (lambda *_, **__: None) if rank == 0 else None) as log:
        summary = train(config, load_placement(directory), log)
    return {"summary": summary, "changed": changed}


@pytest.mark.timeout(1700)
def test_smollm2_learns_in_a_pipeline_from_what_vllm_samples(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = Path(resolve("builtin:smollm2"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    placement = make_placement(base, TYPES, rank=8)
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    with vllm_serving(model, tmp_path / "vllm.log", *LORA) as server:
        ranks = run_ranks(2, _learn, str(tmp_path), server.url, timeout_s=1500)
    log, _ = read_log(tmp_path / "run" / "train" / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, NUM_UPDATES + 1))
    last = log[-5:]
    first_error = log[0]["reward_std"] / math.sqrt(NUM_COMPLETIONS)
    last_error = math.sqrt(sum(entry["reward_std"] ** 2 for entry in last)) / len(last) / math.sqrt(NUM_COMPLETIONS)
    rise = sum(entry["reward"] for entry in last) / len(last) - log[0]["reward"]
    assert rise > math.hypot(first_error, last_error)
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in log) < 1e-3
    assert log[-1]["kl"] > 0
    for found in ranks:
        assert found["changed"] == []
    adapted = PeftModel.from_pretrained(base, ranks[0]["summary"]["adapter"])
    weights = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights} == set(placement.modules)
    assert all(bool(weight.any()) for weight in weights.values())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", **SIZES)
    placement = make_placement(tiny("llama", **SIZES), rank=4)
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    return tmp_path


def _run_tiny(directory: Path, url: str, **options: Any) -> dict[str, Any]:
    train = {"max_steps": 3, "gradient_accumulation_steps": 1, "max_completion_length": 4, "save_steps": 10,
             "vllm": {"url": url, "timeout_s": 10}}  # fmt: skip
    return run_grpo(directory, "run", sampler="vllm", train=train, **options)


def test_a_run_starts_a_server_in_its_environment_and_ends_it(directory: Path) -> None:
    vllm = {"timeout_s": 300, "max_model_len": 64}
    train = {"max_steps": 2, "gradient_accumulation_steps": 1, "max_completion_length": 4, "temperature": 0.8,
             "sampler": "vllm", "engine_python": str(PYTHON), "vllm": vllm}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        found = run_grpo(directory, "run", sampler="vllm", train=train)
    assert [entry["step"] for entry in found["entries"]] == [1, 2]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in found["entries"])
    address = re.search(r"http://127\.0\.0\.1:\d+", (directory / "run" / "train" / "vllm.log").read_text())
    assert address is not None
    with pytest.raises(OSError, match="Connection refused"):
        urllib.request.urlopen(f"{address[0]}/health", timeout=5)


def test_a_server_without_adapters_is_named_before_the_first_step(directory: Path) -> None:
    named = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    with (
        vllm_serving(directory / "model", directory / "vllm.log", updating=False) as server,
        pytest.raises(ConfigError, match=named),
    ):
        _run_tiny(directory, server.url)
    assert not (directory / "run" / "train" / "checkpoints").exists()


def test_ranks_and_folders_that_the_server_refuses_and_its_death_are_named(directory: Path) -> None:
    with vllm_serving(directory / "model", directory / "vllm.log", *LORA) as server:
        asked = VLLMServer(server.url, 10)
        with pytest.raises(ConfigError, match="it must see that folder under the same path"):
            asked.load("elsewhere", Path("/nowhere/step-0"))
        make_placement(tiny("llama", **SIZES), rank=16).to_file(directory / "placement.json")
        with pytest.raises(ConfigError, match=r"LoRA rank 16 is greater than max_lora_rank 8.*--max-lora-rank"):
            _run_tiny(directory, server.url)
        make_placement(tiny("llama", **SIZES), rank=4).to_file(directory / "placement.json")
        cut = _run_tiny(directory, server.url, num_steps=2)
        assert [entry["step"] for entry in cut["entries"]] == [1, 2]
        assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in cut["entries"])
        server.kill()
        began = time.monotonic()
        named = re.escape("has not answered within train.vllm.timeout_s (10 s)")
        with pytest.raises(ConfigError, match=named):
            _run_tiny(directory, server.url)
        assert 5 < time.monotonic() - began < 60
