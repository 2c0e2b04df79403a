"""Which tokens are scored: every file format, every way to say what the text is, and a plan that loses no sample."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import DataConfig
from plop_dist.data.builtin import random_tokens
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import collate, plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.data.texts import render
from plop_dist.errors import ConfigError, DataError
from tests.models import tiny_tokenizer

ROWS = [{"question": "one plus two?", "answer": "3"}, {"question": 'a, "b"\nand ünïcode\u2028?', "answer": "4"}]


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    # a blank line, and a line separator inside a string, which splitlines() would cut at
    "rows.jsonl": lambda path: path.write_text("\n".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "nested.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "rows.csv": write_csv,
    "ROWS.CSV": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert load_rows(str(tmp_path / name)) == ROWS


def test_text_lines_and_builtin_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("first\n\n  \r\nsecond\u2028line\n")
    assert load_rows(str(tmp_path / "rows.txt")) == [{"text": "first"}, {"text": "second\u2028line"}]
    rows = load_rows("builtin:arithmetic")
    assert len(rows) >= 200
    assert {"question", "answer"} <= set(rows[0])
    assert rows == load_rows("builtin:arithmetic")
    assert all(isinstance(row["text"], str) for row in load_rows("builtin:python"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl: line 2 is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', r"list\.jsonl: row 2 is a list, expected an object"),
        ("bad.json", b'[{"text": "a"},\n}', r"bad\.json: line 2 is not JSON"),
        ("object.json", b'{"text": "a"}', r"object\.json holds an object, expected a list of rows"),
        ("latin.txt", b"caf\xe9\n", r"latin\.txt is not UTF-8 text"),
        ("bad.parquet", b"PAR1 nothing", r"bad\.parquet is not a whole parquet file"),
        ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"deep\.jsonl: line 2 is not JSON that can be read"),
        ("digits.json", b"[" + b"1" * 5000 + b"]", r"digits\.json: line 1 is not JSON that can be read"),
        ("short.csv", b"text,answer\na,b\nc\n", r"short\.csv: line 3 has 1 fields, but the header has 2"),
        ("long.csv", b"text\na, b\n", r"long\.csv: line 2 has 2 fields, but the header has 1; quote"),
        ("twice.csv", b"text,text\na,b\n", r"twice\.csv: line 1: column 'text' is there twice"),
        ("quote.csv", b'text\n"never closed\n', r"quote\.csv: line 2 is not CSV"),
        ("blank.json", b" \n", "holds no rows; there is nothing to score"),
        ("empty.jsonl", b"", "holds no rows; there is nothing to score"),
        ("empty.json", b"[]", "holds no rows; there is nothing to score"),
        ("empty.csv", b"question,answer\n", "holds no rows; there is nothing to score"),
        ("blank.txt", b"\n \n", "holds no rows; there is nothing to score"),
        ("rows.xml", b"<a/>", r"has the ending '\.xml'; known are \.jsonl, \.json, \.csv, \.parquet, \.txt"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name))


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path 'absent\.jsonl' does not exist"):
        load_rows("absent.jsonl")
    with pytest.raises(DataError, match="is an empty directory"):
        load_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"'builtin:arithmetik' is unknown; builtin sources are builtin:arithmetic"):
        load_rows("builtin:arithmetik")


def test_text_by_field_template_and_messages() -> None:
    tokenizer = tiny_tokenizer()
    by_template = DataConfig(path="x", template="Q: {question} {}\n{answer}{answer}")
    assert render(ROWS[0], 1, by_template) == "Q: one plus two? {}\n33"
    assert render({"question": "{answer}", "answer": 4}, 1, by_template) == "Q: {answer} {}\n44"
    odd_names = DataConfig(path="x", template='{"q": "{my-q}", "n": {the number.1}}')
    assert render({"my-q": "one", "the number.1": 1}, 1, odd_names) == '{"q": "one", "n": 1}'
    assert render(ROWS[0], 1, DataConfig(path="x", text_field="answer")) == "3"
    assert render({"text": "t", "other": "o"}, 1, DataConfig(path="x")) == "t"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    by_messages = DataConfig(path="x", messages_field="chat")
    assert render({"chat": messages}, 1, by_messages, tokenizer) == "user: hi\nassistant: ho\n"


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"a": "x"}, {"text_field": "b"}, r"x\.jsonl: row 7 has no column 'b'; it has a"),
        ({"a": "x"}, {"template": "{a} {b}"}, "row 7 has no column 'b'; it has a"),
        ({"a": "x"}, {"template": "{a} {my-b}"}, "row 7 has no column 'my-b'; it has a"),
        ({"a": "x"}, {"template": "no braces"}, "names no column"),
        ({"a": "x"}, {"messages_field": "b"}, "row 7 has no column 'b'"),
        (
            {"a": "x", "b": "y"},
            {},
            r"row 7 has no column 'text'; it has a, b: say which is the text with data\.text_field",
        ),
        ({"a": 5}, {"text_field": "a"}, "row 7: column 'a' is a number, expected text"),
        ({"a": None}, {"text_field": "a"}, "row 7: column 'a' is null, expected text"),
        ({"a": None}, {"template": "{a}"}, "row 7: column 'a' is null, but the template needs a text or a number"),
        ({"a": {"b": 1}}, {"template": "{a}"}, "row 7: column 'a' is an object, but the template needs"),
        ({"a": [{"role": "user", "content": None}]}, {"messages_field": "a"}, "row 7: column 'a' must be a list of"),
        ({"a": [1]}, {"messages_field": "a"}, "row 7: column 'a' must be a list of"),
        ({"a": "hello"}, {"messages_field": "a"}, "row 7: column 'a' must be a list of"),
        ({"a": []}, {"messages_field": "a"}, "row 7: column 'a' must be a list of"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(row, 7, DataConfig(path="x.jsonl", **fields), tiny_tokenizer())


def test_a_tokenizer_without_a_chat_template_is_said_so() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    row = {"a": [{"role": "user", "content": "hi"}]}
    with pytest.raises(DataError, match="row 7: the tokenizer's chat template cannot render column 'a'"):
        render(row, 7, DataConfig(path="x.jsonl", messages_field="a"), tokenizer)


def test_rows_are_taken_in_order_or_by_a_seeded_shuffle() -> None:
    rows = [{"text": str(number)} for number in range(20)]
    assert select_rows(rows, DataConfig(path="x", num_samples=5)) == rows[:5]
    first, again, other = (select_rows(rows, DataConfig(path="x", shuffle=True, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first, key=lambda row: int(row["text"])) == rows
    assert len(select_rows(rows, DataConfig(path="x", num_samples=50))) == 20


def test_tokens_are_truncated_and_texts_without_tokens_kept_in_place() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"text": "x" * 50}, {"text": ""}, {"text": "abc"}]
    samples = tokenize(rows, DataConfig(path="x", max_length=10), tokenizer)
    assert [len(sample) for sample in samples] == [10, 0, 3]
    assert samples[2] == tokenizer("abc")["input_ids"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " \n\t"], "the text of all 2 rows is empty or only whitespace; check data.text_field"),
        (["fine", "half a \ud83d"], "x: row 2: the text is not whole Unicode"),
    ],
)
def test_texts_that_no_tokenizer_can_use(texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize([{"text": text} for text in texts], DataConfig(path="x"), tiny_tokenizer())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_rows(str(tmp_path / name)) == ROWS


def test_a_long_document_in_a_csv(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(load_rows(str(tmp_path / "long.csv"))[0]["text"]) == 200_000


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    num_replicas=st.integers(1, 4),
    per_step=st.integers(1, 4),
    uniform=st.booleans(),
    in_order=st.booleans(),
)
def test_a_plan_has_each_sample_once(
    lengths: list[int], batch_size: int, num_replicas: int, per_step: int, uniform: bool, in_order: bool
) -> None:
    plan = plan_steps(lengths, batch_size, num_replicas, per_step, uniform=uniform, in_order=in_order)
    flat = [index for step in plan for replica in step for micro in replica for index in micro]
    assert sorted(flat) == [index for index, length in enumerate(lengths) if length]
    for step in plan:
        assert len(step) == num_replicas
        assert any(micro for replica in step for micro in replica)
        for replica in step:
            assert len(replica) == per_step if uniform else len(replica) <= per_step
            assert all(len(micro) <= batch_size for micro in replica)
    if in_order:  # no sample runs in an earlier step than one before it in the file
        steps = [max(index for replica in step for micro in replica for index in micro) for step in plan]
        assert steps == sorted(steps)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_either_side(side: str) -> None:
    samples = [[5, 6, 7], [8], [9, 10]]
    batch = collate(samples, [0, 2], num_rows=3, length=4, pad_id=0, side=side)
    right = {
        "input_ids": [[5, 6, 7, 0], [9, 10, 0, 0], [5, 6, 7, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
        "sample_ids": [[0, 0, 0, -1], [2, 2, -1, -1], [-1, -1, -1, -1]],  # the last row is a filler
    }
    left = {
        "input_ids": [[0, 5, 6, 7], [0, 0, 9, 10], [0, 5, 6, 7]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]],
        "sample_ids": [[-1, 0, 0, 0], [-1, -1, 2, 2], [-1, -1, -1, -1]],
    }
    for name, expected in (left if side == "left" else right).items():
        assert getattr(batch, name).tolist() == expected, name
        assert getattr(batch, name).dtype == torch.int64
    assert batch.position_ids is not None
    real = batch.position_ids[batch.attention_mask == 1].tolist()
    assert real == [0, 1, 2, 0, 1, 0, 1, 2]


def test_micro_batches_of_a_step_have_one_shape_and_each_token_once() -> None:
    samples = [[4] * length for length in (3, 9, 1, 0, 7, 2, 5)]
    plan = plan_steps([len(s) for s in samples], 2, 2, 2, uniform=True, in_order=False)
    seen: list[int] = []
    for step in plan:
        shapes = set()
        for replica in range(2):
            for batch in step_micro_batches(samples, step, replica, pad_id=0, side="left"):
                shapes.add(tuple(batch.input_ids.shape))
                assert bool((batch.attention_mask.sum(dim=1) > 0).all())  # no row is padding throughout
                seen += batch.sample_ids[batch.sample_ids >= 0].tolist()
        assert len(shapes) == 1
    assert {sample: seen.count(sample) for sample in set(seen)} == {0: 3, 1: 9, 2: 1, 4: 7, 5: 2, 6: 5}


def test_random_tokens_are_the_vocabularys_and_the_same_for_the_same_seed() -> None:
    tokenizer = tiny_tokenizer()
    data = DataConfig(path="builtin:random", num_samples=300, max_length=100, seed=3)
    rows = select_rows(load_rows(data.path), data)
    samples = tokenize(rows, data, tokenizer)
    assert samples == tokenize(rows, data, tokenizer)
    assert {len(sample) for sample in samples} == {100}
    assert samples != tokenize(rows, data.model_copy(update={"seed": 4}), tokenizer)
    assert len({tuple(sample) for sample in samples}) == 300
    counts = Counter(token for sample in samples for token in sample)
    assert set(counts) == set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    expected = 300 * 100 / len(counts)
    assert max(abs(count - expected) for count in counts.values()) < 6 * expected**0.5


def test_random_tokens_begin_as_the_tokenizer_has_texts_begin() -> None:
    class Tokenizer:
        bos_token_id = 7
        all_special_ids = (7,)

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 2, "<s>": 7}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [7]}

    tokens = random_tokens("0", 0, Tokenizer(), 5)
    assert tokens[0] == 7
    assert len(tokens) == 5
    assert set(tokens[1:]) <= {1, 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": {"path": "builtin:random", "text_field": "text"}}, "data.text_field is given, but data.path builtin"),
        (
            {"data": {"path": "builtin:random"}, "train": {"method": "sft"}},
            "train.method is sft, but data.path builtin",
        ),
    ],
)
def test_random_tokens_are_for_scoring_alone(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"name_or_path": "some/model"}, **keys}, source="here")
