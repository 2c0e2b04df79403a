"""Comparisons by reward: the trainings are those of `run`, held-out rewards are one process's, more is better."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from plop_dist.backends.hf.load import load_end_tokens, load_tokenizer
from plop_dist.compare.arms import build_arms
from plop_dist.compare.comparison import check, compare
from plop_dist.compare.result import Comparison
from plop_dist.compare.runs import Runs
from plop_dist.compare.summing_up import Trained, sum_up
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.data.builtin import arithmetic_rows
from plop_dist.errors import ConfigError, DataError
from plop_dist.report.comparison import print_comparison, summary
from plop_dist.training.rewards import final_number
from plop_dist.training.samplers.noise import sampled
from plop_dist.training.train import train as run_training
from plop_dist.values.console import VisibleConsole
from plop_dist.values.scores import Scores
from tests.compare.test_compare import quietly, same, scored
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks

ARMS = ["lowest_k", "all"]
LENGTH = 6


def variety(completions: list[str], **columns: Any) -> list[float]:
    """Return how many different characters each completion has."""
    return [float(len(set(completion))) for completion in completions]


def lower(completions: list[str], **columns: Any) -> list[float]:
    """Return how many small letters each completion has for each of its tokens, at most 1: soon learnt, by all."""
    return [min(sum(character.islower() for character in completion) / LENGTH, 1.0) for completion in completions]


def short_prompts_alone(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Rate nothing of the longest prompts."""
    return [None if len(prompt) > 120 else 1.0 for prompt in prompts]


def make_config(directory: Path, run: str, *, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    """Return a comparison of two arms by steps of two prompts with four completions, whatever the replicas."""
    if not (directory / "model").is_dir():
        save_tiny("llama", directory / "model")
    options = {"method": "grpo", "max_steps": 3, "learning_rate": 0.05, "seed": 5, "num_generations": 4,
               "micro_batch_size": 4 // parallel.get("dp", 1), "gradient_accumulation_steps": 2,
               "max_completion_length": LENGTH, "rewards": [f"{__name__}:variety", "builtin:number"],
               "answer_field": "number", "prompt_template": "{question}"}  # fmt: skip
    return parse_config(
        {
            "run_dir": str(directory / run),
            "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
            "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 32},
            "placement": {"k": 2, "rank": 4, "alpha": 8},
            "parallel": parallel,
            "train": {**options, **(train or {})},
            "compare": {"arms": ARMS, "rates": 1, "seeds": 2, "held_out": 16},
        }
    )


def own_rewards(config: Config, adapter: Path | None) -> list[float]:
    """Return each held-out row's reward, token by token from a plain PEFT model, one row at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = load_tokenizer(config.model)
    ends = load_end_tokens(config.model, tokenizer)
    found = []
    for index, row in enumerate(arithmetic_rows()[-config.compare.held_out :]):
        ids = tokenizer(row["question"])["input_ids"]
        start = len(ids)
        for position in range(LENGTH):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[:, -1]
            ids.append(int(sampled(logits, config.train.temperature, [f"sample:0:-1:{index}:{position}"])))
            if ids[-1] in ends:
                break
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        found.append(float(len(set(text))) + float(final_number(text) == int(row["number"])))
    return found


@pytest.mark.slow
def test_trainings_are_those_of_run_and_rewards_one_process_s(tmp_path: Path) -> None:
    config = scored(make_config(tmp_path, "run"))
    found = compare(config, quietly)
    assert (found.method, found.measure) == ("grpo", "held-out reward")
    assert found.base == pytest.approx(np.mean(own_rewards(config, None)[1::2]))
    arms = build_arms(Scores.from_file(config.run_path / "scores.json"), ARMS, config.placement, 0)
    for arm, candidate in zip(found.arms, arms, strict=True):
        for run in arm.runs:
            train = {"seed": run.seed, "engine": "plop", "eval_samples": 16}
            one = make_config(tmp_path, f"{arm.arm}-{run.seed}", train=train)
            run_training(one, candidate.placement, lambda entry: None)
            rewards = own_rewards(config, one.run_path / "train" / "adapter")
            assert run.row_values == tuple(rewards[1::2])
            assert run.value == pytest.approx(np.mean(rewards[1::2]))
            assert run.choosing == (pytest.approx(np.mean(rewards[::2])) if run.seed == 5 else None)
    (one,) = found.comparisons
    lowest, everything = found.arms
    assert lowest.value is not None
    assert everything.value is not None
    assert one.difference == pytest.approx(lowest.value - everything.value)  # more is better


def _compared(rank: int, directory: str, run: str, parallel: dict[str, Any]) -> dict[str, Any]:
    config = scored(make_config(Path(directory), run, **parallel))
    return compare(config, quietly).model_dump(mode="json", by_alias=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"backend": "transformers", "dp": 2},
        pytest.param({"backend": "transformers", "tp": 2}, marks=pytest.mark.rare),
        pytest.param({"backend": "deepspeed", "dp": 2, "zero_stage": 2}, marks=pytest.mark.rare),
        pytest.param({"backend": "deepspeed", "dp": 2, "zero_stage": 3}, marks=pytest.mark.rare),
        pytest.param({"backend": "megatron", "tp": 2}, marks=[needs_bridge, pytest.mark.rare]),
    ],
    ids=lambda parallel: "-".join(map(str, parallel.values())),
)
def test_layouts_sample_and_train_as_one_process(tmp_path: Path, parallel: dict[str, Any]) -> None:
    one = scored(make_config(tmp_path, "one"))
    every = run_ranks(2, _compared, str(tmp_path), "sharded", parallel)
    for name in ("scores.json", "samples.safetensors"):  # of the same ranks, which Megatron has as multiples of tp
        (one.run_path / name).write_bytes((tmp_path / "sharded" / name).read_bytes())
    expected = compare(one, quietly)
    for found in map(Comparison.model_validate, every):
        same(found, expected)
        assert [run.row_values for arm in found.arms for run in arm.runs] == [
            run.row_values for arm in expected.arms for run in arm.runs
        ]


@pytest.mark.slow
def test_an_arm_that_earns_more_is_better_in_words_of_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm whose alpha is a millionth learns next to nothing beside one that is trained."""
    train = {"max_steps": 24, "learning_rate": 0.05, "lr_scheduler": "constant", "rewards": [f"{__name__}:lower"]}
    config = scored(make_config(tmp_path, "run", train=train))
    options = {"seeds": 3, "rates": 1, "held_out": 64}
    config = config.model_copy(update={"compare": config.compare.model_copy(update=options)})
    held_out = config.model_copy(update={"train": config.train.model_copy(update={"eval_samples": 64})})
    runs = Runs(held_out, quietly_told)
    scores = Scores.from_file(config.run_path / "scores.json")
    candidate, _ = build_arms(scores, ARMS, config.placement, 0)
    still = replace(candidate, name="still", placement=candidate.placement.model_copy(update={"alpha": 1e-6}))
    base = runs.measure_base(candidate.placement)
    arms = []
    for one in (candidate, still):
        trained = Trained(one)
        for seed in range(3):
            train = held_out.train.model_copy(update={"seed": 5 + seed})
            trained.by_seed.append(runs.train(held_out.model_copy(update={"train": train}), one.placement, []))
        trained.by_rate[0] = trained.by_seed[0]
        arms.append((one, trained))
    found = sum_up(config, scores, arms, runs.method, base.values)
    (against,) = found.comparisons
    assert against.verdict == "better"
    assert against.difference is not None
    assert against.difference > 0.2
    assert found.arms[1].value == pytest.approx(found.base, abs=0.05)
    turned = sum_up(config, scores, arms[::-1], runs.method, base.values).comparisons[0]
    assert (turned.verdict, turned.difference) == ("worse", pytest.approx(-against.difference))
    print_comparison(found, VisibleConsole(width=80))
    shown = capsys.readouterr().out.splitlines()
    assert ["arm", "rank", "rate", "reward"] in [line.split()[:4] for line in shown]
    assert summary(found).startswith("lowest_k is better than still")
    # At half of the steps the one that earns less is behind, and the one that earns more is not.
    best, worst = (np.array(trained.by_seed[0].choosing) for _, trained in arms)
    assert runs.is_hopeless(worst.tolist(), [best])
    assert not runs.is_hopeless(best.tolist(), [worst])


def quietly_told(entry: dict[str, Any]) -> None:
    """Take a step's entry without showing it."""


@pytest.mark.slow
def test_a_held_out_row_that_no_reward_rates_is_named(tmp_path: Path) -> None:
    config = scored(make_config(tmp_path, "run", train={"rewards": [f"{__name__}:short_prompts_alone"]}))
    with pytest.raises(DataError, match=r"builtin:arithmetic: held-out row \d{4}: none of train.rewards \(short_pro"):
        compare(config, quietly)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"engine": "trl"}, "train.engine is 'trl', which has a loop of its own; use train.engine=auto"),
        ({"engine": "verl"}, "train.engine is 'verl', which has a loop"),
        ({"sampler": "vllm", "vllm": {"url": "http://127.0.0.1:1"}}, "with the same noise, which train.sampler 'vllm'"),
        ({"vllm": {"url": "http://127.0.0.1:1"}}, "use train.sampler=model, without train.vllm.url"),
        ({"num_generations": 3}, "which train.num_generations = 3 does not divide"),
    ],
)
def test_what_is_not_compared_by_reward_is_refused(tmp_path: Path, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(make_config(tmp_path, "run", train=train))


@pytest.mark.slow
def test_a_held_out_row_without_an_answer_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1 = ", "number": str(i + 1)} for i in range(40)]
    rows[30]["number"] = "none"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(tmp_path, "run", train={"data_path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match=r"rows.jsonl: row 31: column 'number' holds no number"):
        compare(scored(config), quietly)
