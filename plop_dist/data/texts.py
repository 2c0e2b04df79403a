"""Which text a row is, and which token ids: the same for scoring, for training and for prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from plop_dist.config.schema import DataConfig
from plop_dist.data.images import content_parts, joined_texts, kind_of_part
from plop_dist.data.rows import BUILTIN_FIELD, kind_of
from plop_dist.errors import DataError, first_line

_BRACES = re.compile(r"\{([^{}]+)\}")
_UNREAD = re.compile(r"video|audio")  # of types of content parts, in chat templates and in OpenAI's API
_NAME = re.compile(r"\w(?:[\w .-]*\w)?")

Row = Mapping[str, Any]


def render(row: Row, number: int, data: DataConfig, tokenizer: Any = None) -> str:
    """Return the text of a row by data.text_field, data.template or data.messages_field.

    `number` is the row's place for messages. Raises DataError naming the row and the column that is missing.
    """
    if data.template is not None:
        return fill(data.template, row, number, data.path)
    if data.messages_field is not None:
        return _chat(row, number, data, tokenizer, is_open=False)
    field = data.text_field or BUILTIN_FIELD.get(data.path) or ("text" if "text" in row else None)
    if field is None:
        raise DataError(
            f"{data.path}: row {number} has no column 'text'; it has {_columns(row)}: say which is the text with "
            "data.text_field, data.template or data.messages_field."
        )
    return _text(_column(row, field, number, data.path), field, number, data.path)


def render_prompt(row: Row, number: int, data: DataConfig, template: str | None, tokenizer: Any = None) -> str:
    """Return what a completion of the row begins with: the filled template, or without one what is scored of it.

    Of data.messages_field it is the chat up to its last answer, with the opening of the next one. Raises DataError
    as render does.
    """
    if template is not None:
        return fill(template, row, number, data.path)
    if data.messages_field is not None:
        return _chat(row, number, data, tokenizer, is_open=True)
    return render(row, number, data)


def messages_of(row: Row, number: int, data: DataConfig) -> list[Mapping[str, Any]]:
    """Return the messages in data.messages_field of a row. Raises DataError for what is no list of messages."""
    field = str(data.messages_field)
    value = _column(row, field, number, data.path)
    # A chat template renders a string, or messages without a role, as if they were empty: silently wrong text.
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(item, Mapping) and "role" in item and _says_something(item) for item in value)
    ):
        raise DataError(
            f"{data.path}: row {number}: column '{field}' must be a list of "
            f'{{"role": ..., "content": ...}}, but it is {str(value)[:60]!r}.'
        )
    for kind in map(kind_of_part, content_parts(value)):
        if _UNREAD.search(kind):  # a chat template passes over it, or writes a place that nothing fills
            raise DataError(
                f"{data.path}: row {number}: column '{field}' has a content part of type '{kind}', and only texts and "
                "images are read here; score in your own job, by plop_dist.score(model, batches)."
            )
    return value


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


def token_ids(
    texts: Sequence[str],
    data: DataConfig,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    first: int = 1,
    is_target: bool = False,
) -> list[list[int]]:
    """Return the token ids of each text by the tokenizer's defaults, truncated to max_length if that is given.

    data: its messages_field tells that a chat template has written the special tokens already; its path and `first`,
    the number of the first row, are for messages. is_target: the texts are a decoder's, for which some tokenizers have
    words of their own. Raises DataError naming the row whose text is not Unicode, and for a
    tokenizer that fails, as by a pattern without end.
    """
    for number, text in enumerate(texts, start=first):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{data.path}: row {number}: the text is not whole Unicode: {error}.") from error
    if not texts:
        return []
    options: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    if data.messages_field is not None:
        options["add_special_tokens"] = False
    try:
        named = {"text_target" if is_target else "text": list(texts)}
        return [list(ids) for ids in tokenizer(**named, **options)["input_ids"]]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust code ends with, which is no Exception
            raise
        raise DataError(
            f"{data.path}: the tokenizer fails on these texts ({first_line(error)}); a pattern or a table of its "
            "tokenizer.json does not fit them: put the tokenizer there that the model was trained with."
        ) from error


def _chat(row: Row, number: int, data: DataConfig, tokenizer: Any, *, is_open: bool) -> str:
    """Return the row's messages as the chat template writes them; open: without a last answer, but with its opening."""
    field = str(data.messages_field)
    messages = joined_texts(messages_of(row, number, data))
    options: dict[str, Any] = {"tokenize": False}
    if is_open:
        options["add_generation_prompt"] = True
        if messages[-1].get("role") == "assistant":
            messages = messages[:-1]
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # chat templates raise whatever their authors chose
        raise DataError(
            f"{data.path}: row {number}: the tokenizer's chat template cannot render column '{field}' "
            f"({str(error) or type(error).__name__}); the tokenizer must have a chat template that takes these roles."
        ) from error


def _column(row: Row, name: str, number: int, source: str) -> Any:
    if name not in row:
        raise DataError(f"{source}: row {number} has no column '{name}'; it has {_columns(row)}.")
    return row[name]


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
