"""`check` says OK where a run goes through, and not OK, with what to change, where one would fail."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.cases import Outcome, plop_dist, write_case
from tests.models import save_tiny

SFT = {"method": "sft", "max_steps": 1, "eval_samples": 2, "micro_batch_size": 2, "max_length": 32}

VERL = ["train.method=grpo", "train.engine=verl", "train.num_generations=2", "train.lr_scheduler=constant"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verdict")
    return write_case(directory, save_tiny("llama", directory / "model"), train=SFT)


def check(config: Path, *overrides: str) -> Outcome:
    return plop_dist("check", config, *overrides)


def test_what_is_decided_before_scoring_is_shown_and_it_is_ok(config: Path) -> None:
    outcome = check(config, "data.num_samples=8")
    assert outcome.status == 0, outcome.err
    assert re.search(
        r"^Placement: lowest_k: 3 of 7 types, known once they are scored · "
        r"[\d,]+ \([\d.]+%\) to [\d,]+ \([\d.]+%\) trainable",
        outcome.out, re.MULTILINE,
    )  # fmt: skip
    training = r"^Training: about [\d.]+ \w+ on the fullest rank: weights .* activations of 64 tokens"
    assert re.search(training, outcome.out, re.MULTILINE)
    assert "Export: peft: every choice" in outcome.out
    assert "run would do: score: it has not run yet · place" in outcome.out
    assert outcome.out.endswith("Verdict: OK\n")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["placement.k=8"], "placement.k is 8, but there are only 7 candidate types"),
        (["placement.policy=highest_k", "placement.k=8"], "placement.k is 8"),
        (["data.num_samples=500"], "data.num_samples is 500, but"),
        (["placement.rank=4096"], "takes an update of rank"),
        (["placement.k=1", "placement.rank=40", "placement.include=[k_proj]"], "placement.rank is 40 for k_proj"),
        (["placement.exclude=[lm_hed]"], "'lm_hed' matches no module"),
        (["export.engine=jax"], "--engine is 'jax', but peft has: peft"),
        (["export.targets=[openrlhf]", "placement.alpha=2.5"], "takes a whole number as alpha"),
        (["export.targets=[torchtune]", "placement.k=1"], "export target torchtune cannot express"),
        (["train.eval_samples=8"], "train.eval_samples holds out 8"),
        ([*VERL, "train.max_length=2"], "tokens, but train.max_length is 2, and train.engine 'verl' asks none"),
        ([VERL[0], "train.micro_batch_size=40"], "a step of train.engine 'trl' asks 10 prompts of one epoch"),
        ([*VERL, "train.micro_batch_size=20"], "a step of train.engine 'verl' asks 10 prompts of one epoch"),
        (["train.prompt_template=Q {answer}"], "does not begin with train.prompt_template"),
    ],
)
def test_what_a_run_would_fail_at_is_not_ok(config: Path, overrides: list[str], part: str) -> None:
    outcome = check(config, *overrides)
    if "cannot express" in part:  # only some choices are refused: nobody knows yet
        assert outcome.status == 0
        assert f"warning: {part}" in outcome.out
        assert "OK, with" in outcome.out
        return
    assert outcome.status == 2
    assert "Verdict: not OK: 1 thing to change" in outcome.out
    assert outcome.err.count("error:") == 1
    assert part in outcome.err
    assert "Traceback" not in outcome.err


def test_every_problem_is_said_at_once(config: Path) -> None:
    outcome = check(config, "placement.k=9", "placement.rank=4096", "data.num_samples=500")
    assert "Verdict: not OK: 3 things to change" in outcome.out
    for part in ("placement.k is 9", "placement.rank is 4096", "data.num_samples is 500"):
        assert part in outcome.err


def test_what_is_cut_off_and_what_is_fewer_than_the_default_is_said(config: Path) -> None:
    outcome = check(config, "data.max_length=16")
    assert outcome.status == 0
    assert re.search(r"warning: data.num_samples is 200, but .* has 8 rows; all of them are scored\.", outcome.out)
    cut = re.search(
        r"warning: (\d) of 8 samples are longer than data.max_length \(16\) and lose \d+% of all", outcome.out
    )
    assert cut
    assert int(cut[1]) > 0


def test_a_rank_that_only_some_types_can_take_is_said(config: Path) -> None:
    outcome = check(config, "placement.rank=40")
    assert outcome.status == 0
    assert re.search(r"warning: If they are chosen, .*k_proj \(rank 40, 32 at most\)", outcome.out)


def test_a_folder_without_tokenizer_or_weights_cannot_run(tmp_path: Path, config: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    for path in [*model.glob("tokenizer*"), *model.glob("*.safetensors")]:
        path.unlink()
    outcome = check(config, f"model.name_or_path={model}", "train.method=none")
    assert outcome.status == 2
    assert "No tokenizer beside config.json" in outcome.err
    assert "No weights beside config.json" in outcome.err
    assert json.loads((model / "config.json").read_text())


def test_what_would_run_next_knows_what_is_done(tmp_path: Path) -> None:
    config = write_case(tmp_path, save_tiny("llama", tmp_path / "model"))
    assert plop_dist("score", config).status == 0
    assert "run would do: score: kept · place: it has not run yet" in check(config).out
    assert "score: data.max_length changed from 256 to 64 · place" in check(config, "data.max_length=64").out


def test_experts_that_zero3_has_partitioned_are_not_trained(tmp_path: Path) -> None:
    config = write_case(tmp_path, save_tiny("qwen3_moe", tmp_path / "model"), train=SFT)
    parallel = ["parallel.backend=deepspeed", "parallel.dp=2", "parallel.zero_stage=3"]
    outcome = check(config, "placement.experts=true", *parallel)
    assert outcome.status == 2
    assert "train.method is sft at parallel.zero_stage 3, but " in outcome.err
    for others in (["placement.experts=true", *parallel[:2], "parallel.zero_stage=2"], parallel):
        assert "parallel.zero_stage 3, but" not in check(config, *others).err
