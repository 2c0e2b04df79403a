"""Which tokens are scored: rows rendered to text, tokenised, and laid out in micro-batches."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from plop_dist.config.schema import DataConfig
from plop_dist.data.rows import BUILTIN_FIELD, kind_of
from plop_dist.errors import DataError
from plop_dist.measure.protocols import MicroBatch

_BRACES = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"\w(?:[\w .-]*\w)?")

Row = Mapping[str, Any]


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
    field = data.text_field or BUILTIN_FIELD.get(data.path) or ("text" if "text" in row else None)
    if field is None:
        raise DataError(
            f"{data.path}: row {number} has no column 'text'; it has {_columns(row)}: say which is the text with "
            "data.text_field, data.template or data.messages_field."
        )
    return _text(_column(row, field, number, data.path), field, number, data.path)


def fill(template: str, row: Row, number: int, source: str) -> str:
    """Return the template with each `{column}` replaced by the row's text or number.

    Raises DataError naming row and column if one is missing, or null, a list or an object, which Python would spell
    in its own way ("None").
    """
    names = [name for name in _BRACES.findall(template) if name in row or _NAME.fullmatch(name)]
    if not names:
        raise DataError(f"template {template!r} names no column; write columns in braces, e.g. '{{question}}'.")
    for name in names:
        value = _column(row, name, number, source)
        if value is None or isinstance(value, list | Mapping):
            raise DataError(
                f"{source}: row {number}: column '{name}' is {kind_of(value)}, but the template needs a text or a "
                "number; mend or drop the row, or build the text in a column of its own."
            )
    return _BRACES.sub(lambda match: str(row[match[1]]) if match[1] in names else match[0], template)


def tokenize(rows: Sequence[Row], data: DataConfig, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each row: the tokenizer's defaults, truncated to data.max_length.

    Raises DataError when no row yields a token, when all are blank, and naming the row whose text is not Unicode.
    """
    texts = [render(row, number, data, tokenizer) for number, row in enumerate(rows, start=1)]
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{data.path}: row {number}: the text is not whole Unicode: {error}.") from error
    if not any(map(str.strip, texts)):
        raise DataError(
            f"{data.path}: the text of all {len(texts)} rows is empty or only whitespace; check data.text_field, "
            "data.template or data.messages_field."
        )
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


def _column(row: Row, name: str, number: int, source: str) -> Any:
    if name not in row:
        raise DataError(f"{source}: row {number} has no column '{name}'; it has {_columns(row)}.")
    return row[name]


def _messages(row: Row, field: str, number: int, source: str) -> Any:
    value = _column(row, field, number, source)
    # A chat template renders a string, or messages without a role, as if they were empty: silently wrong text.
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(item, Mapping) and "role" in item and _says_something(item) for item in value)
    ):
        raise DataError(
            f"{source}: row {number}: column '{field}' must be a list of "
            f'{{"role": ..., "content": ...}}, but it is {str(value)[:60]!r}.'
        )
    return value


def _says_something(message: Mapping[str, Any]) -> bool:
    return message.get("content") is not None or bool(message.get("tool_calls"))


def _text(value: Any, field: str, number: int, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{source}: row {number}: column '{field}' is {kind_of(value)}, expected text; use "
            "data.messages_field for chat messages or data.template to build the text."
        )
    return value


def _columns(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"
