"""Which columns of the data are the text, as far as their names say it."""

from __future__ import annotations

from pathlib import Path

from plop_dist.data.rows import load_rows

_PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_MESSAGES = ("messages", "conversations")
_IMAGES = ("images", "image")
_KEYS = "data.text_field, data.template or data.messages_field"


def guess_text(path: str) -> tuple[dict[str, str], str | None]:
    """Return the keys of the configuration that say what the text of these rows is, and what the user must do about it.

    Data on a hub is not looked at. Raises DataError for a file that cannot be read.
    """
    if path.startswith("builtin:"):
        return {}, None
    if not Path(path).suffix and not Path(path).exists():
        return {}, f"{path} is not looked at here; if it has no column 'text', say by {_KEYS} what its text is."
    columns = tuple(load_rows(path)[0])
    keys = text_keys(columns)
    if keys is None:
        return {}, f"{path} has the columns {', '.join(columns)}; say by {_KEYS} which of them are the text."
    return keys, None


def text_keys(columns: tuple[str, ...]) -> dict[str, str] | None:
    """Return the keys for rows with these columns: none where `text` is one of them, None where no name is known.

    >>> text_keys(("id", "prompt", "completion"))
    {'data.template': '{prompt}\\n{completion}'}
    >>> text_keys(("messages", "images"))
    {'data.messages_field': 'messages', 'data.images_field': 'images'}
    """
    if "text" in columns:
        return {}
    for name in _MESSAGES:
        if name in columns:
            images = next(({"data.images_field": image} for image in _IMAGES if image in columns), {})
            return {"data.messages_field": name, **images}
    for first, second in _PAIRS:
        if first in columns and second in columns:
            return {"data.template": f"{{{first}}}\n{{{second}}}"}
    return {"data.text_field": columns[0]} if len(columns) == 1 else None
