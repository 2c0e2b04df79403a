"""Which tokens are scored: rows of a file or dataset, rendered to text, tokenised, and laid out in micro-batches."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from plop_dist import builtin_data
from plop_dist.config import DataConfig
from plop_dist.errors import DataError, MissingExtraError
from plop_dist.protocols import MicroBatch

_BUILTIN_FIELD = {"builtin:arithmetic": "question", "builtin:python": "text"}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

Row = Mapping[str, Any]


def load_rows(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Return the rows of a jsonl, json, csv, parquet or txt file, of a builtin source, or of a `datasets` id.

    Raises DataError naming the file, and the line where one is malformed.
    """
    if path == "builtin:arithmetic":
        return list(builtin_data.arithmetic_rows())
    if path == "builtin:python":
        return list(builtin_data.python_rows())
    if path.startswith("builtin:"):
        raise DataError(f"data.path '{path}' is unknown; builtin sources are {', '.join(_BUILTIN_FIELD)}.")
    file = Path(path)
    if file.is_dir() and not any(file.iterdir()):
        raise DataError(f"data.path '{path}' is an empty directory; pass a file or a datasets id.")
    if file.is_file():
        rows = _read_file(file)
    elif file.suffix.lower() in _READERS or (path.startswith((".", "/", "~")) and not file.is_dir()):
        raise DataError(f"data.path '{path}' does not exist; pass a {', '.join(_READERS)} file or a datasets id.")
    else:
        rows = _read_dataset(path, split)
    if not rows:
        raise DataError(f"data.path '{path}' holds no rows; there is nothing to score.")
    return rows


def select_rows(rows: Sequence[Row], data: DataConfig) -> list[Row]:
    """Return the first num_samples rows, in file order or after a shuffle seeded with data.seed."""
    chosen = list(rows)
    if data.shuffle:
        random.Random(data.seed).shuffle(chosen)
    return chosen[: data.num_samples]


def render(row: Row, number: int, data: DataConfig, tokenizer: Any = None) -> str:
    """Return the text of a row by data.text_field, data.template or data.messages_field.

    `number` is the row's place for messages. Raises DataError naming the row and the column that is missing.
    """
    if data.template is not None:
        return fill(data.template, row, number, data.path)
    if data.messages_field is not None:
        messages = _messages(row, data.messages_field, number, data.path)
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # chat templates raise whatever their authors chose
            raise DataError(
                f"{data.path}: row {number}: the tokenizer's chat template cannot render column "
                f"'{data.messages_field}' ({str(error) or type(error).__name__}); the tokenizer must have a "
                "chat template that takes these roles."
            ) from error
    field = data.text_field or _BUILTIN_FIELD.get(data.path) or ("text" if "text" in row else None)
    if field is None:
        raise DataError(
            f"{data.path}: rows have the columns {', '.join(map(str, row))}; say which is the text with "
            "data.text_field, data.template or data.messages_field."
        )
    return _text(_column(row, field, number, data.path), field, number, data.path)


def fill(template: str, row: Row, number: int, source: str) -> str:
    """Return the template with each `{column}` replaced by the row's value. Raises DataError if one is missing."""
    names = _PLACEHOLDER.findall(template)
    if not names:
        raise DataError(f"template {template!r} names no column; write columns in braces, e.g. '{{question}}'.")
    return _PLACEHOLDER.sub(lambda match: str(_column(row, match.group(1), number, source)), template)


def tokenize(rows: Sequence[Row], data: DataConfig, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each row: the tokenizer's defaults, truncated to data.max_length.

    Raises DataError when no row yields a token.
    """
    texts = [render(row, number, data, tokenizer) for number, row in enumerate(rows, start=1)]
    options: dict[str, Any] = {"truncation": True, "max_length": data.max_length}
    if data.messages_field is not None:
        options["add_special_tokens"] = False  # the chat template has written them already
    samples = [list(ids) for ids in tokenizer(texts, **options)["input_ids"]]
    if not any(samples):
        raise DataError(f"{data.path}: none of the {len(samples)} rows yields a token; check data.text_field.")
    return samples


def plan_steps(
    lengths: Sequence[int], batch_size: int, num_replicas: int, per_step: int, *, uniform: bool, in_order: bool
) -> list[list[list[list[int]]]]:
    """Return which samples run when: plan[step][replica] is a list of micro-batches, each a list of sample indices.

    Samples of similar length share a micro-batch (less padding, the same scores), unless `in_order`, which a scoring
    that may stop early needs in order not to stop after the long ones only. With `uniform` each replica
    runs every step with `per_step` micro-batches, empty ones where it has no samples left; without it a replica may
    have fewer. The same on every rank.
    """
    order = [index for index, length in enumerate(lengths) if length]
    if not in_order:
        order.sort(key=lambda index: -lengths[index])  # the longest first: a lack of memory shows at once
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    width = num_replicas * per_step
    plan = []
    for start in range(0, len(batches), width):
        part = batches[start : start + width]
        replicas = [part[replica::num_replicas] for replica in range(num_replicas)]
        if uniform:
            replicas = [micro + [[]] * (per_step - len(micro)) for micro in replicas]
        plan.append(replicas)
    return plan


def collate(
    samples: Sequence[Sequence[int]], indices: Sequence[int], *, num_rows: int, length: int, pad_id: int, side: str
) -> MicroBatch:
    """Return the samples as one padded micro-batch of shape (num_rows, length), int64, on the CPU.

    Rows beyond len(indices) are fillers: they repeat a sample and count for nothing (sample_ids -1), because a row
    that is padding throughout has no defined attention. position_ids count real tokens from 0 whatever the side.
    """
    filler = indices[0] if indices else next(index for index, sample in enumerate(samples) if sample)
    input_ids = torch.full((num_rows, length), pad_id)
    attention_mask = torch.zeros(num_rows, length, dtype=torch.int64)
    sample_ids = torch.full((num_rows, length), -1)
    for row in range(num_rows):
        index = indices[row] if row < len(indices) else filler
        tokens = torch.tensor(samples[index][:length])
        at = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        input_ids[row, at] = tokens
        attention_mask[row, at] = 1
        if row < len(indices):
            sample_ids[row, at] = index
    return MicroBatch(input_ids, attention_mask, sample_ids, (attention_mask.cumsum(dim=1) - 1).clamp_min(0))


def step_micro_batches(
    samples: Sequence[Sequence[int]], step: list[list[list[int]]], replica: int, *, pad_id: int, side: str
) -> list[MicroBatch]:
    """Return one replica's micro-batches of a planned step, all of one shape, as pipelines and experts want."""
    every = [indices for micro in step for indices in micro]
    num_rows = max(len(indices) for indices in every)
    length = max(len(samples[index]) for indices in every for index in indices)
    return [
        collate(samples, indices, num_rows=num_rows, length=length, pad_id=pad_id, side=side)
        for indices in step[replica]
    ]


def _read_file(file: Path) -> list[dict[str, Any]]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"data.path '{file}' has the ending '{file.suffix}'; known are {', '.join(_READERS)}.")
    try:
        rows = reader(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number} is a {type(row).__name__}, expected an object with columns.")
    return rows


def _read_jsonl(file: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}: line {number} is not JSON: {error.msg} at column {error.colno}.") from error
    return rows


def _read_json(file: Path) -> list[Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno} is not JSON: {error.msg} at column {error.colno}.") from error
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list)]
        tree = lists[0] if len(lists) == 1 else tree
    if not isinstance(tree, list):
        raise DataError(f"{file} holds a {type(tree).__name__}, expected a list of rows.")
    return tree


def _read_csv(file: Path) -> list[Any]:
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _read_parquet(file: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("parquet files need the package 'pyarrow': pip install 'plop-dist[train]'") from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a parquet file: {error}.") from error


def _read_txt(file: Path) -> list[Any]:
    return [{"text": line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt}


def _read_dataset(name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"data.path '{name}' is not a file, and a datasets id needs: pip install 'plop-dist[train]'"
        ) from error
    config = None
    identifier = name
    if ":" in name:  # openai/gsm8k:main
        identifier, config = name.split(":", 1)
    try:
        return [dict(row) for row in datasets.load_dataset(identifier, config, split=split)]
    except Exception as error:  # the hub client raises a dozen kinds; the user needs the one sentence
        raise DataError(
            f"data.path '{name}' is neither a file nor a dataset that can be loaded (split '{split}'): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _column(row: Row, name: str, number: int, source: str) -> Any:
    if name not in row:
        raise DataError(f"{source}: row {number} has no column '{name}'; it has {', '.join(map(str, row)) or 'none'}.")
    return row[name]


def _messages(row: Row, field: str, number: int, source: str) -> Any:
    value = _column(row, field, number, source)
    # A chat template renders a string, or messages without a role, as if they were empty: silently wrong text.
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(item, Mapping) and "role" in item for item in value)
    ):
        raise DataError(
            f"{source}: row {number}: column '{field}' must be a list of "
            f'{{"role": ..., "content": ...}}, but it is {str(value)[:60]!r}.'
        )
    return value


def _text(value: Any, field: str, number: int, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{source}: row {number}: column '{field}' is a {type(value).__name__}, expected text; use "
            "data.messages_field for chat messages or data.template to build the text."
        )
    return value
