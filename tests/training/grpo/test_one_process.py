"""GRPO in one process: whole runs equal TRL's, resume changes nothing, rewards that fail are named and lose nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from plop_dist.errors import ConfigError, DataError
from plop_dist.training.grpo.metrics import is_metric
from plop_dist.training.train import check_trainable, engine_name
from tests.models import save_tiny, tiny
from tests.training.cases import make_placement
from tests.training.grpo import cases
from tests.training.grpo.cases import NUM_STEPS, check_equal, make_config, run_grpo


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"num_iterations": 2, "beta": 0.05},
        pytest.param({"loss_type": "bnpo", "temperature": 0.7}, marks=pytest.mark.rare),
    ],
    ids=["several-updates", "on-policy"],
)
def test_a_run_that_was_cut_off_ends_like_a_whole_one(directory: Path, train: dict[str, Any]) -> None:
    options = {"train": train, "sampler": "model"}
    whole = run_grpo(directory, "whole", **options)
    assert [entry["step"] for entry in whole["entries"]] == list(range(1, NUM_STEPS + 1))
    run_grpo(directory, "cut", num_steps=4, **options)
    resumed = run_grpo(directory, "cut", **options)
    assert [entry["step"] for entry in resumed["entries"]] == [3, 4, 5]
    check_equal(resumed, whole, lambda: tiny("llama"))


@pytest.mark.slow
def test_a_whole_run_is_trls_on_the_same_tokens(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    # Rows that are all alike: TRL and we draw their order from different generators.
    row = {"text": "2 + 3 = ", "number": "5"}
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    options = {"max_steps": 4, "num_iterations": 2, "beta": 0.05, "gradient_accumulation_steps": 2, "temperature": 0.8,
               "data_path": str(directory / "rows.jsonl"), "answer_field": "number"}  # fmt: skip
    ours = run_grpo(directory, "ours", train=options)
    calls: list[int] = []

    def generate(trainer: Any, prompts: list[str]) -> Any:
        ids = trainer.processing_class(prompts)["input_ids"]
        completions = [ours["sampled"][len(calls), place] for place in range(len(prompts))]
        calls.append(len(prompts))
        return ids, completions, None, trainer.processing_class.batch_decode(completions), None, {}, None, None

    monkeypatch.setattr(trl.GRPOTrainer, "_generate", generate)
    theirs = run_grpo(directory, "theirs", train={**options, "engine": "trl"})
    assert calls == [8, 8]
    check_equal(ours, theirs, lambda: tiny("llama"), keys=("grad_norm", "learning_rate"))
    for key in ("reward", "reward_std"):  # TRL logs them of the first step on new completions alone
        expected = [entry[key] for entry in theirs["entries"] if key in entry]
        assert [entry[key] for entry in ours["entries"][::2]] == pytest.approx(expected, rel=1e-5)
    for mine, trls in zip(ours["entries"], theirs["entries"], strict=True):
        names = {name for name in trls if is_metric(name)}
        assert names == {name for name in mine if is_metric(name)}
        # A mean over the step's tokens, where TRL has the mean of two micro-batches' means.
        assert [mine[name] for name in names] == pytest.approx([trls[name] for name in names], rel=0.3, abs=1e-6)
    assert theirs["entries"][-1]["kl"] > 1e-5


@pytest.mark.parametrize("engine", ["plop", pytest.param("trl", marks=pytest.mark.slow)])
def test_a_reward_that_fails_names_the_row_and_loses_no_step(
    directory: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"engine": engine}
    given = cases.variety
    calls: list[int] = []

    def failing(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        values = given(completions)
        return [*values[:2], float("nan"), *values[3:]] if len(calls) == 4 else values

    failing.__name__ = "variety"
    monkeypatch.setattr(cases, "variety", failing)
    number = re.compile(r"'variety' returned nan for row \d+, for the completion .* run again to go on from them")
    with pytest.raises(ConfigError, match=number):
        run_grpo(directory, "failed", train=options)
    monkeypatch.setattr(cases, "variety", given)
    resumed = run_grpo(directory, "failed", train=options)
    assert [entry["step"] for entry in resumed["entries"]] == [4, 5]  # save_steps is 2
    if engine == "plop":  # TRL's generator has gone on where a step was refused
        check_equal(resumed, run_grpo(directory, "whole", train=options), lambda: tiny("llama"))


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        ({"engine": "plop"}, {"backend": "deepspeed", "dp": 2, "zero_stage": 2}, "at which only TRL trains"),
        ({"engine": "trl"}, {"backend": "deepspeed", "tp": 2}, "which TRL cannot train; use train.engine=plop"),
        ({}, {"backend": "megatron", "cp": 2}, "parallel.cp 2: a completion's tokens lie on several ranks"),
        ({"num_generations": 3}, {}, "completions per step, which train.num_generations = 3 does not divide"),
        ({"vllm": {"dtype": "bfloat16"}}, {}, "train.vllm.dtype is bfloat16, which neither TRL nor a server"),
        ({"reward_weights": [1.0]}, {}, "train.reward_weights has 1 weights for 2 rewards"),
        ({"reward_timeout_s": 400}, {"backend": "deepspeed", "tp": 2}, "wait no longer than cluster.timeout_s (600 s)"),
        ({"packing": True}, {}, "train.packing is true with train.method grpo"),
    ],
)
def test_what_is_not_trained_is_refused_by_name(
    directory: Path, train: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    config = make_config(directory, "refused", train=train, **parallel)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_trainable(config)


def test_who_trains(directory: Path) -> None:
    def name(engine: str, **parallel: Any) -> str:
        return engine_name(make_config(directory, "named", train={"engine": engine}, **parallel))

    assert name("auto") == "trl"
    assert name("auto", backend="deepspeed", dp=2, zero_stage=3) == "trl"
    assert name("auto", backend="megatron", tp=2) == "megatron"
    assert name("auto", backend="transformers", tp=2) == "tp_plan"
    assert name("plop") == "replicas"
    assert name("verl", backend="megatron") == "verl"


def test_a_prompt_without_a_token_is_refused(directory: Path) -> None:
    rows = [{"text": "2 + 3 = ", "number": "5"}, {"text": "", "number": "5"}] * 20
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2: the prompt has no token"):
        run_grpo(directory, "refused", train={"data_path": str(directory / "rows.jsonl")})
