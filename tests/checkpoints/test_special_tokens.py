"""A special token that is none is refused before a tokenizer is made of it, which would take minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.checkpoints.special_tokens import check_special_tokens
from plop_dist.errors import ModelError
from tests.cli.cases import assert_one_message, plop_dist, write_case
from tests.models import save_tiny

LONG = "x" * 100_000


@pytest.mark.parametrize("value", [LONG, {"content": LONG}, ["<a>", LONG], {"<a>": {"content": LONG}}])
def test_a_long_token_is_named(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": LONG, "bos_token": "<s>"}))
    check_special_tokens(tmp_path)
    path.write_text(json.dumps({"eos_token": value}))
    with pytest.raises(ModelError, match="eos_token is a text of 100,000 characters"):
        check_special_tokens(tmp_path)
    path.write_text("{")
    check_special_tokens(tmp_path)


def test_check_refuses_at_once(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": LONG}))
    assert_one_message(plop_dist("score", write_case(tmp_path, model)), str(path), "bos_token")
