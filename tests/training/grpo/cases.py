"""GRPO runs that tests compare: a tiny model, builtin:arithmetic, and samplers that hand out given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.registry import SAMPLERS
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.grpo.metrics import is_metric
from plop_dist.training.samplers.sampler import Completion, Prompt
from plop_dist.training.train import train
from tests.models import random_tokens
from tests.training.cases import KilledError, assert_equal, load_placement

NUM_STEPS = 5
KEYS = ("loss", "grad_norm", "reward", "reward_std", "reward/variety", "reward/vowels", "completion_length")


class GivenSampler:
    """Hands out random tokens that depend on generation and row alone, of unequal lengths."""

    def __init__(self, engine: RewardedEngine, config: Config, tokenizer: Any) -> None:
        self._most = config.train.max_completion_length

    def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
        """Return the tokens. See Sampler."""
        made = []
        for prompt in prompts:
            key = 100 * generation + prompt.row
            ids = random_tokens(1, 1 + key * 7 % self._most, seed=key)[0].tolist()
            made.append(Completion(ids))
        return made

    def close(self) -> None:
        """Hold nothing. See Sampler."""


def variety(completions: list[str], **columns: Any) -> list[float]:
    """Rate how many different characters a completion has."""
    return [float(len(set(completion))) for completion in completions]


async def vowels(completions: list[str], **columns: Any) -> list[float | None]:
    """Rate the share of vowels; an empty completion is not rated."""
    return [sum(c in "aeiou" for c in text) / len(text) if text else None for text in completions]


def make_config(directory: str | Path, run: str, *, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    """Return a configuration of few short steps: four prompts' completions of each in two micro-batches or more."""
    options = {"method": "grpo", "engine": "plop", "max_steps": NUM_STEPS, "learning_rate": 0.01, "warmup_steps": 1,
               "max_grad_norm": 0.3, "micro_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4,
               "max_completion_length": 6, "save_steps": 2, "seed": 5, "answer_field": "number",
               "rewards": ["tests.training.grpo.cases:variety", "tests.training.grpo.cases:vowels"],
               "reward_weights": [0.5, 2.0], "reward_timeout_s": 60}  # fmt: skip
    return parse_config(
        {
            "run_dir": str(Path(directory, run)),
            "model": {"name_or_path": str(Path(directory, "model")), "dtype": "float32"},
            "data": {"path": "builtin:arithmetic"},
            "parallel": parallel,
            "train": {**options, **(train or {})},
        }
    )


def run_grpo(
    directory: str | Path, run: str, *, sampler: str = "given", num_steps: int = 0, **options: Any
) -> dict[str, Any]:
    """Train on this rank and return log entries, summary and the tokens that were sampled.

    sampler: `given` or one of the registry's. num_steps: train only so far, as if killed. Collective over all ranks.
    """
    config = make_config(directory, run, **options)
    entries: list[dict[str, Any]] = []

    def log(entry: dict[str, Any]) -> None:
        entries.append(entry)
        if entry["step"] == num_steps:
            raise KilledError

    sampled: dict[tuple[int, int], list[int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        address = "tests.training.grpo.cases:GivenSampler" if sampler == "given" else SAMPLERS.own[sampler]
        patch.setattr("plop_dist.training.grpo.train.load", lambda kind, name: _recording(address, sampled))
        try:
            summary = train(config, load_placement(directory), log)
        except KilledError:
            return {"entries": entries}
    return {"entries": [entry for entry in entries if "grad_norm" in entry], "summary": summary, "sampled": sampled}


def _recording(address: str, sampled: dict[tuple[int, int], list[int]]) -> Any:
    from plop_dist.registry import import_attribute

    class Recording(import_attribute(address, "sampler")):  # type: ignore[misc]
        def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
            made = super().sample(prompts, generation)
            sampled.update({(generation, p.row): c.ids for p, c in zip(prompts, made, strict=True)})
            return made

    return Recording


def check_equal(
    found: dict[str, Any],
    expected: dict[str, Any],
    load_base: Callable[[], nn.Module],
    keys: Sequence[str] = KEYS,
    *,
    adapter_as_one: bool = False,
) -> None:
    """Assert that entries are those of the other run, and that the adapter, loaded in plain PEFT, is its adapter.

    load_base: returns the model without adapters. keys: what is compared of the entries; by default all metrics too.
    adapter_as_one: compare all of the adapter as one vector, by its length, instead of every entry: Adam divides by the
    root of the second moment, so that an entry whose gradient is hardly more than its rounding goes either way.
    """
    from peft import PeftModel

    assert [entry["step"] for entry in found["entries"]] == [entry["step"] for entry in expected["entries"]][
        -len(found["entries"]) :
    ]
    metrics = [key for key in expected["entries"][-1] if is_metric(key)] if keys is KEYS else []
    for key in (*keys, *metrics):
        values = [entry[key] for entry in expected["entries"]][-len(found["entries"]) :]
        if key == "loss" and max(map(abs, values)) < 1e-3:
            values = [value + 1.0 for value in values]  # the first loss on new completions is advantages that cancel
            assert_equal(key, [entry[key] + 1.0 for entry in found["entries"]], values, tolerance=1e-6)
        else:
            assert_equal(key, [entry[key] for entry in found["entries"]], values)
    weights = []
    for run in (expected, found):
        model = PeftModel.from_pretrained(load_base(), run["summary"]["adapter"])
        weights.append({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert bool(weight.any()), f"{name} is zero"
        if not adapter_as_one:
            assert_equal(name, weights[1][name], weight, tolerance=1e-3)
    whole, other = (torch.cat([weight.flatten() for weight in one.values()]).double() for one in weights)
    assert torch.isfinite(whole).all()
    error = float((other - whole).norm() / whole.norm())
    assert error <= 1e-2, f"the adapters are {error:.2e} of their length apart"
