"""How far a run has come: one JSON line per event, shown as a bar on a terminal and as plain lines in a pipe."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plop_dist.errors import PlopError
from plop_dist.values.files import append_line
from plop_dist.values.secret_texts import without_secrets
from plop_dist.values.visible import say

_LABEL = {"baseline": "baselines of modules", "scoring": "samples scored", "training": "training steps"}
_LINE_SECONDS = 5.0


class EventWriter:
    """Appends events to RUN_DIR/events.jsonl; only rank 0 has one, the driver reads it."""

    def __init__(self, path: Path, hide: Callable[[str], str] = str) -> None:
        """hide: takes out of a text what is not to be written (Config.hide)."""
        self._path = path
        self._hide = hide
        self._last: dict[str, float] = {}

    def __call__(self, kind: str, **fields: Any) -> None:
        """Note an event. Progress of one kind is kept ten times a second at most, its last one always.

        Raises RunDirError.
        """
        now = time.monotonic()
        is_last = fields.get("done") == fields.get("total")
        if "done" in fields and not is_last and now - self._last.get(kind, -1.0) < 0.1:
            return
        self._last[kind] = now
        fields = {
            name: without_secrets(self._hide(value)) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        append_line(self._path, json.dumps({"event": kind, "time": round(time.time(), 3), **fields}))


class EventHandler(logging.Handler):
    """A logging handler whose records become events: what a worker logs is shown by the driver."""

    def __init__(self, notify: EventWriter) -> None:
        super().__init__()
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as an event."""
        with suppress(PlopError):
            self._notify("status", text=record.getMessage())


class EventDisplay:
    """Shows events on stderr: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from plop_dist.values.console import VisibleConsole

        self._console = VisibleConsole(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._tasks: dict[str, Any] = {}
        self._shown: dict[str, float] = {}

    def __enter__(self) -> EventDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, kind: str, **fields: Any) -> None:
        """Show one event."""
        if "done" in fields and kind in _LABEL:
            self._progress(kind, fields["done"], fields["total"], fields.get("note", ""))
        else:
            self._line(_sentence(kind, fields))

    def _progress(self, kind: str, done: int, total: int, note: str) -> None:
        if self._bar is not None:
            if kind not in self._tasks:
                self._tasks[kind] = self._bar.add_task(_LABEL[kind], total=total)
            self._bar.update(self._tasks[kind], completed=done, total=total, description=f"{_LABEL[kind]} {note}")
            return
        now = time.monotonic()
        if done == total or now - self._shown.setdefault(kind, now - _LINE_SECONDS + 2) >= _LINE_SECONDS:
            self._shown[kind] = now
            self._line(f"{_LABEL[kind]}: {done}/{total} {note}".rstrip())

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            with suppress(OSError):  # `2>&1 | head` must not cost the run; events.jsonl has every line
                say(text, to_stderr=True)


@contextmanager
def both(writer: EventWriter) -> Iterator[Any]:
    """Yield a function that writes and shows each event: what a run without a driver uses."""
    with EventDisplay() as display:

        def notify(kind: str, **fields: Any) -> None:
            writer(kind, **fields)
            display(kind, **fields)

        yield notify


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show on a terminal that something is under way that has no count; nothing in a pipe."""
    from plop_dist.values.console import VisibleConsole

    with VisibleConsole(stderr=True).status(text):
        yield


def _sentence(kind: str, fields: dict[str, Any]) -> str:
    if kind == "resumed":
        return f"resumed: {fields['done']} of {fields['total']} samples were scored before"
    if kind == "stable":
        sure = f"the selection is {fields['confidence']:.0%} sure"
        return f"stopped after {fields['done']} of {fields['total']} samples: {sure}"
    return fields.get("text") or f"{kind}: " + ", ".join(f"{key} {value}" for key, value in fields.items())


@contextmanager
def shown(events: Path) -> Iterator[None]:
    """Show what rank 0 appends to events.jsonl while the block runs."""
    start = events.stat().st_size if events.is_file() else 0
    ended = threading.Event()
    with EventDisplay() as display:
        thread = threading.Thread(target=_follow, args=(events, start, ended, display), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=5)


def _follow(events: Path, position: int, ended: threading.Event, display: EventDisplay) -> None:
    rest = b""  # a line may still be in the writing, even in the middle of a letter
    is_last = False
    while not is_last:
        is_last = ended.wait(0.2)
        if not events.is_file():
            continue
        with events.open("rb") as handle:
            handle.seek(position)
            rest += handle.read()
            position = handle.tell()
        *lines, rest = rest.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                event = json.loads(line)
                kind = event.pop("event")
                event.pop("time", None)
                if kind != "worker":  # process ids are for operators, who read the file
                    display(kind, **event)
