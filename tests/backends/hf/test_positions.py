"""Texts longer than a model's table of places: refused before its weights are read, for scoring and for training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from plop_dist.costs.plan import build_plan
from plop_dist.errors import DataError
from plop_dist.training.image_data import training_data
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
