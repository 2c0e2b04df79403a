"""What an engine asks the model: chats, which reach it in the very words that were scored.

Engines put every prompt through a chat template. Messages go through the checkpoint's own; a text that is no chat gets
a template that writes it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.data.images import joined_texts
from plop_dist.data.texts import messages_of, render_prompt
from plop_dist.errors import ConfigError, DataError
from plop_dist.training.data import RowSet, prompts_of

_AS_IT_IS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """What every row asks: the messages, and the text that these become.

    template: the chat template that they need; None: the checkpoint's.
    """

    chats: Sequence[Chat]
    texts: Sequence[str]
    template: str | None


def chat_template(config: Config, tokenizer: Any) -> str | None:
    """Return the template that writes a text as it is, or None where the rows are chats. Raises ConfigError.

    It begins as the tokenizer begins a text: with its beginning-of-text token, if it puts one there by itself.
    """
    if config.train.prompt_template is None and config.data.messages_field is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"data.messages_field is '{config.data.messages_field}', but the tokenizer of model.name_or_path "
                f"'{config.model.name_or_path}' has no chat template; use a checkpoint with one, or data.template."
            )
        return None
    ids = tokenizer("x")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + _AS_IT_IS


def prompts_for(row_set: RowSet, config: Config, tokenizer: Any) -> Prompts:
    """Return the rows' prompts as chats: a text is one message of the user. Raises DataError naming the row."""
    template = chat_template(config, tokenizer)
    texts = prompts_of(row_set, config.train, tokenizer)  # renders, and so checks, every row
    if template is not None:
        return Prompts([[{"role": "user", "content": text}] for text in texts], texts, template)
    chats = []
    for number, row in row_set.numbered():
        messages = [dict(message) for message in joined_texts(messages_of(row, number, row_set.data))]
        chats.append(messages[:-1] if messages[-1].get("role") == "assistant" else messages)
    _check_filled(chats, texts, row_set, tokenizer)
    return Prompts(chats, texts, None)


def _check_filled(chats: Sequence[Chat], texts: Sequence[str], row_set: RowSet, tokenizer: Any) -> None:
    """Raise DataError for a chat that reads otherwise once every message has every key: tables fill them with null."""
    keys = sorted({key for chat in chats for message in chat for key in message})
    for number, (chat, text) in enumerate(zip(chats, texts, strict=True), start=row_set.first):
        filled = [{key: message.get(key) for key in keys} for message in chat]
        row = {str(row_set.data.messages_field): filled}
        if filled != chat and render_prompt(row, number, row_set.data, None, tokenizer) != text:
            missing = sorted({key for message in chat for key in keys if key not in message})
            raise DataError(
                f"{row_set.data.path}: row {number}: messages lack the keys {', '.join(missing)} of others, which the "
                "engine's file fills with null, and the chat template writes another text then; give every message "
                "the same keys."
            )
