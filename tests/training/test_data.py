"""Training rows: which tokens count, what is packed, what is held out, and an order that no layout changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import DataError
from plop_dist.training.batch import IGNORED, Batch
from plop_dist.training.data import Example, RowSet, TrainingData, collate, encode, pack, split_rows
from plop_dist.training.loop import micro_batch_indices
from tests.models import tiny_tokenizer

NUM_ROWS = 11
HELD_OUT = 3


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def make_config(directory: Path, **train: Any) -> Config:
    path = directory / "rows.jsonl"
    rows = [{"question": f"Q{i}" * (1 + i % 4), "answer": f"-{i}"} for i in range(NUM_ROWS)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return parse_config(
        {
            "run_dir": str(directory / "run"),
            "model": {"name_or_path": "unused"},
            "data": {"path": str(path), "template": "{question}{answer}"},
            "train": {"method": "sft", "micro_batch_size": 2, "eval_samples": HELD_OUT, "seed": 3, **train},
        }
    )


def tokens_of(row: dict[str, str], config: Config, tokenizer: Any) -> Example:
    (example,) = encode(RowSet([row], config.data), config.train, tokenizer)
    return example


def batch(data: TrainingData, step: int, dp_rank: int = 0, dp_size: int = 1, accumulation: int = 1) -> list[Batch]:
    """Return one replica's micro-batches of a step."""
    return [data.micro_batch(index) for index in micro_batch_indices(step, accumulation, dp_rank, dp_size)]


def texts(micro_batches: list[Batch], tokenizer: Any) -> list[str]:
    return [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for micro_batch in micro_batches
        for ids, mask in zip(micro_batch["input_ids"], micro_batch["attention_mask"], strict=True)
    ]


def test_the_prompts_tokens_are_left_out_of_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(tmp_path, prompt_template="{question}")
    example = tokens_of({"question": "1+2=", "answer": "3"}, config, tokenizer)
    assert tokenizer.decode(example.input_ids) == "1+2=3</s>"
    assert example.labels == [IGNORED] * 4 + example.input_ids[4:]
    whole = tokens_of({"question": "1+2=", "answer": "3"}, make_config(tmp_path), tokenizer)
    assert whole.labels == whole.input_ids == example.input_ids
    cut = tokens_of({"question": "1+2=", "answer": "3"}, make_config(tmp_path, max_length=3), tokenizer)
    assert cut.input_ids == cut.labels == example.input_ids[:3]
    with pytest.raises(DataError, match=r"row 1: the text does not begin with train\.prompt_template's 'A: 1"):
        tokens_of({"question": "1", "answer": "2"}, make_config(tmp_path, prompt_template="A: {question}"), tokenizer)


def test_prompts_that_leave_no_room_are_no_training(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(tmp_path, prompt_template="{question}", max_length=4)
    with pytest.raises(DataError, match=r"no token of 1 rows is in the loss; train\.max_length is 4"):
        tokens_of({"question": "1+2=", "answer": "3"}, config, tokenizer)


def test_rows_without_a_token_in_the_loss_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = TrainingData(make_config(tmp_path, prompt_template="{question}", max_length=6), tokenizer)
    assert 0 < len(data.sequences) < NUM_ROWS - HELD_OUT
    assert all(example.has_target for (example,) in data.sequences)
    left_out = NUM_ROWS - HELD_OUT - len(data.sequences)
    assert f"{left_out} of {NUM_ROWS - HELD_OUT} training rows are left out" in caplog.text


def test_packing_keeps_samples_whole_in_order_and_apart() -> None:
    examples = [Example(list(range(10 * n, 10 * n + size)), [7] * size) for n, size in enumerate((3, 2, 4, 5, 1))]
    groups = pack(examples, 6)
    assert [[len(example.input_ids) for example in group] for group in groups] == [[3, 2], [4], [5, 1]]
    assert [example for group in groups for example in group] == examples
    packed = collate(groups, pad_id=99)
    assert packed["input_ids"].tolist() == [
        [0, 1, 2, 10, 11, 99], [20, 21, 22, 23, 99, 99], [30, 31, 32, 33, 34, 40],
    ]  # fmt: skip
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    # No sample's first token is predicted from the sample before it.
    assert packed["labels"].tolist() == [
        [IGNORED, 7, 7, IGNORED, 7, IGNORED], [IGNORED, 7, 7, 7, IGNORED, IGNORED], [IGNORED, 7, 7, 7, 7, IGNORED],
    ]  # fmt: skip


def test_held_out_rows_are_the_last_and_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(tmp_path)
    rows, held_out = split_rows(config)
    assert [row["answer"] for row in held_out.rows] == ["-8", "-9", "-10"]
    assert [row["answer"] for row in rows.rows] == [f"-{i}" for i in range(8)]
    data = TrainingData(config, tokenizer)
    left_out = set(texts(data.held_out, tokenizer))
    assert len(left_out) == HELD_OUT
    trained = {text for step in range(20) for text in texts(batch(data, step), tokenizer)}
    assert len(trained) == NUM_ROWS - HELD_OUT
    assert not trained & left_out
    with pytest.raises(DataError, match=r"has 11 rows, but train\.eval_samples holds out 11"):
        split_rows(make_config(tmp_path, eval_samples=NUM_ROWS))
    rows, held_out = split_rows(make_config(tmp_path, eval_path=str(tmp_path / "rows.jsonl")))
    assert len(rows.rows) == NUM_ROWS
    assert held_out.rows == rows.rows[:HELD_OUT]


def test_errors_name_the_rows_own_file_and_number(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    config = make_config(tmp_path, prompt_template="{question}")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({"question": "no answer"})]))
    with pytest.raises(DataError, match=rf"rows\.jsonl: row {NUM_ROWS} has no column 'answer'"):
        TrainingData(config, tokenizer)
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "half a \\ud83d", "answer": "3"}')
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"other\.jsonl: row 1: the text is not whole Unicode"):
        TrainingData(make_config(tmp_path, eval_path=str(other)), tokenizer)


def test_the_order_depends_on_seed_and_step_alone(tmp_path: Path, tokenizer: Any) -> None:
    data, again = (TrainingData(make_config(tmp_path), tokenizer) for _ in range(2))
    order = [texts(batch(data, step), tokenizer) for step in range(8)]
    backwards = [texts(batch(again, step), tokenizer) for step in reversed(range(8))]
    assert order == backwards[::-1]
    first, second = ([text for step in order[start : start + 4] for text in step] for start in (0, 4))
    assert sorted(first) == sorted(second)  # each epoch has every row once,
    assert first != second  # in an order of its own
    other = TrainingData(make_config(tmp_path, seed=4), tokenizer)
    assert [texts(batch(other, step), tokenizer) for step in range(8)] != order


@pytest.mark.parametrize(("dp_size", "accumulation"), [(2, 2), (4, 1)])
def test_the_replicas_share_out_the_very_batch_of_one(
    tmp_path: Path, tokenizer: Any, dp_size: int, accumulation: int
) -> None:
    one, many = (TrainingData(make_config(tmp_path), tokenizer) for _ in range(2))
    for step in range(5):
        shares = [batch(many, step, dp_rank, dp_size, accumulation) for dp_rank in range(dp_size)]
        assert all(len(share) == accumulation for share in shares)
        together = [text for share in shares for text in texts(share, tokenizer)]
        assert sorted(together) == sorted(texts(batch(one, step, accumulation=4), tokenizer))
