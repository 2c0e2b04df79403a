"""Which characters are seen where text is shown, and how those that are not are told: in names, and in what is printed.

Escape sequences, overrides of the reading direction and characters without width make a terminal do or show something
else than the text says. A name from a file is refused with one of them in it; whatever is printed goes through `say`.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from plop_dist.errors import UserError

# Controls, formats (directions, zero width), separators of lines and paragraphs, halves of surrogate pairs.
_HIDDEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})
_IN_TEXT = "\t\n\r"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_JSON_ESCAPE = re.compile(r"\\[ubfnrt]")


def visible(text: str, keep: str = "\t\n") -> str:
    """Return a text with an escape in place of each character that is not seen, except those of `keep`.

    >>> visible("q_proj\\x1b[2J"), visible("a\\tb\\u202e")
    ('q_proj\\\\x1b[2J', 'a\\tb\\\\u202e')
    """
    if text.isprintable():
        return text
    return "".join(_escape(letter) if letter not in keep and _is_hidden(letter) else letter for letter in text)


def say(*texts: object, end: str = "\n", to_stderr: bool = False, at_once: bool = False) -> None:
    """Print texts, each on a line of its own, to stdout or stderr: the one way in which this package prints.

    at_once: also where it goes into a pipe, as what goes to stderr does anyway.
    """
    stream: TextIO | None = sys.stderr if to_stderr else sys.stdout
    print(*(visible(str(text)) for text in texts), sep="\n", end=end, file=stream, flush=at_once or to_stderr)


def log_text(text: str) -> str:
    """Return what another program has logged for a terminal, without its colours and with its bars as lines."""
    return _COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


def make_messages_visible() -> None:
    """Let loggers, warnings and tracebacks of whatever package show hidden characters as escapes, in this process."""
    if logging.getLogRecordFactory() is _VisibleRecord:
        return
    logging.setLogRecordFactory(_VisibleRecord)
    plain_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: visible(plain_warning(*args, **options))
    sys.excepthook = lambda kind, error, trace: say(
        "".join(traceback.format_exception(kind, error, trace)), end="", to_stderr=True
    )


def check_names(tree: Any, where: str, remedy: str, error: type[UserError]) -> None:
    """Raise `error`, naming the field, where a string or key of a JSON tree holds a character that is not seen.

    Line breaks and tabs may stand in texts, which are templates, column names and a policy's own options.
    """
    for field, text in strings(tree):
        allowed = _IN_TEXT if holds_text(field) else ""
        odd = None if text.isprintable() else next((c for c in text if c not in allowed and _is_hidden(c)), None)
        if odd is not None:
            shown, kind = visible(text, keep="")[:200], unicodedata.name(odd, "a control character")
            at = f"{where}: {visible(field, keep='')}" if field else where
            raise error(f"{at}: '{shown}' holds {_escape(odd)} ({kind}), which no name may hold; {remedy}.")


def may_hide_something(json_text: str) -> bool:
    """Tell whether a JSON text could hold characters that are not seen: False is sure, and costs next to nothing."""
    return _JSON_ESCAPE.search(json_text) is not None or not json_text.replace("\n", "").isprintable()


def strings(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings of a JSON tree, keys too, each with the dotted name of the field where it stands."""
    if isinstance(tree, str):
        yield field, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield field, str(key)
            yield from strings(value, f"{field}.{key}" if field else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from strings(value, f"{field}.{index}" if field else str(index))


def holds_text(field: str) -> bool:
    """Tell whether a field of a configuration, under its dotted name, is prose: no name, path or URL."""
    *sections, last = field.split(".")
    return last.endswith(("template", "_field")) or "options" in sections


class _VisibleRecord(logging.LogRecord):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802
        return visible(super().getMessage())


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
