"""Texts longer than a model's table of places: refused before its weights are read, for scoring and for training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from plop_dist.compare.method import method_of
from plop_dist.config.schema import Config
from plop_dist.costs.plan import build_plan
from plop_dist.errors import DataError
from plop_dist.training.image_data import training_data
from plop_dist.training.train import engine_name, load_engine
from tests.backends.hf.test_heads import BART, BERT, IDS, LLAMA, config_in, saved, scored
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.slow

LONG = {
    "GPT2LMHeadModel": ({"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}, 16),
    "OPTForCausalLM": ({"max_position_embeddings": 16, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "word_embed_proj_dim": 32, **IDS}, 16),
    "RobertaForCausalLM": ({**BERT, "max_position_embeddings": 18, "is_decoder": True, **IDS, "pad_token_id": 1}, 16),
    "GPTJForCausalLM": ({"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **IDS}, 16),
    "BartForConditionalGeneration": ({**BART, "max_position_embeddings": 16}, 16),
    "LlamaForCausalLM": ({**LLAMA, "max_position_embeddings": 16}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_texts_longer_than_the_table_of_places_are_refused_before_the_model_is_loaded(
    tmp_path: Path, name: str
) -> None:
    fields, most = LONG[name]
    saved(tmp_path, name, fields)
    config = config_in(tmp_path, train={"prompt_template": "{question}\n"})
    if most is None:
        assert build_plan(config).verdict.is_ok
        assert (scored(config).data.num_tokens or 0) > 3 * 16
        return
    for step in (lambda: build_plan(config), lambda: scored(config)):
        with pytest.raises(DataError, match=rf"has places for {most} alone; set data\.max_length={most}, or"):
            step()
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"max_length": most})})
    assert build_plan(shorter).verdict.is_ok
    assert scored(shorter).modules


def test_training_rows_longer_than_the_table_of_places_are_refused_by_check_and_by_training(tmp_path: Path) -> None:
    fields, most = LONG["GPT2LMHeadModel"]
    saved(tmp_path, "GPT2LMHeadModel", fields)
    data = {"path": str(tmp_path / "rows.jsonl"), "template": "{question}\n{answer}", "max_length": most}
    train = {"method": "sft", "max_steps": 1, "eval_samples": 1, "micro_batch_size": 1}
    config = config_in(tmp_path, data=data, train=train, placement={"exclude": ["lm_head", "q_proj", "k_proj"]})
    message = rf"train\.max_length is \d+ .* has places for {most} alone; set train\.max_length={most}, or"
    assert any(re.match(message, problem) for problem in build_plan(config).verdict.problems)
    with pytest.raises(DataError, match=message):
        training_data(config, tiny_tokenizer())
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"max_length": most})})
    assert not [problem for problem in build_plan(shorter).verdict.problems if "max_length" in problem]
    assert training_data(shorter, tiny_tokenizer()).held_out


def test_prompts_whose_completions_have_no_places_are_refused_by_check_and_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    fields, most = LONG["GPT2LMHeadModel"]
    saved(tmp_path, "GPT2LMHeadModel", fields)
    longest = len(tiny_tokenizer()("hello")["input_ids"])

    def rewarded(length: int, engine: str = "plop") -> Config:
        (tmp_path / "rows.jsonl").write_text('{"question": "hello", "answer": "1"}\n' * 17)
        train = {"method": "grpo", "rewards": ["builtin:number"], "max_completion_length": length, "eval_samples": 8,
                 "num_generations": 2, "micro_batch_size": 2, "engine": engine}  # fmt: skip
        data = {"path": str(tmp_path / "rows.jsonl"), "template": "{question}", "max_length": most}
        return config_in(tmp_path, data=data, train=train)

    placement: Any = None
    left = most - longest
    message = (
        rf"rows.jsonl: row 1: the prompt has {longest} tokens and train.max_completion_length is {left + 1}, together "
        rf"{most + 1}, but .* has places for {most} alone; set train\.max_completion_length={left}, or"
    )
    assert any(re.search(message, problem) for problem in build_plan(rewarded(left + 1)).verdict.problems)
    assert not [problem for problem in build_plan(rewarded(left)).verdict.problems if "places" in problem]
    for engine in ("plop", "trl"):
        with pytest.raises(DataError, match=message):
            load_engine(engine_name(rewarded(left + 1, engine))).train(rewarded(left + 1, engine), placement, print)
    with pytest.raises(DataError, match=message):
        method_of(rewarded(left + 1))
    assert method_of(rewarded(left)).targets_R.sum() == 8


def test_held_out_rows_longer_than_the_table_of_places_are_not_compared(tmp_path: Path) -> None:
    fields, most = LONG["GPT2LMHeadModel"]
    saved(tmp_path, "GPT2LMHeadModel", fields)
    data = {"path": str(tmp_path / "rows.jsonl"), "template": "{question}\n{answer}", "max_length": most}
    config = config_in(tmp_path, data=data, train={"method": "sft", "eval_samples": 1})
    with pytest.raises(DataError, match=rf"has places for {most} alone; set train\.max_length={most}, or"):
        method_of(config)
