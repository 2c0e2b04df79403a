"""How far a run has come: one JSON line per event, written by rank 0 and shown where the command was started."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from plop_dist.errors import PlopError
from plop_dist.rundir.display import EventDisplay
from plop_dist.rundir.talk import kept_apart
from plop_dist.values.files import append_line
from plop_dist.values.secret_texts import without_secrets

_LAST_WAIT_S = 5.0

logger = logging.getLogger("plop_dist")


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
    """A logging handler whose records become events, each text once: what this package logs is shown as it goes on."""

    def __init__(self, notify: Any) -> None:
        super().__init__()
        self._notify = notify
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as an event: a phase where phase() logged it."""
        kind, text = getattr(record, "event", "status"), record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        if kind == "status" and text in self._said:
            return
        self._said.add(text)
        with suppress(PlopError):
            self._notify(kind, text=text)


def phase(text: str) -> None:
    """Say what this rank does from now on, until it says something else: shown with the time that it takes."""
    logger.info("%s", text, extra={"event": "phase"})


@contextmanager
def both(writer: EventWriter, display: EventDisplay) -> Iterator[Any]:
    """Yield a function that writes and shows each event, and takes what is logged: what a run without a driver uses."""

    def notify(kind: str, **fields: Any) -> None:
        writer(kind, **fields)
        display(kind, **fields)

    with _logged_to(notify):
        yield notify


@contextmanager
def working(text: str, log: Path | None = None) -> Iterator[None]:
    """Show what is under way that has no count, with its time; libraries talk to the log meanwhile."""
    with kept_apart(log) as own, EventDisplay(own) as display, _logged_to(display):
        display("phase", text=text)
        yield


@contextmanager
def _logged_to(notify: Any) -> Iterator[None]:
    handler = EventHandler(notify)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def shown(events: Path, stream: TextIO | None = None) -> Iterator[None]:
    """Show what rank 0 appends to events.jsonl while the block runs."""
    start = events.stat().st_size if events.is_file() else 0
    ended = threading.Event()
    with EventDisplay(stream) as display:
        thread = threading.Thread(target=_follow, args=(events, start, ended, display), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=_LAST_WAIT_S)


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
            event = _parsed(line)
            if event is not None and event["event"] != "worker":  # process ids are for operators, who read the file
                display(event.pop("event"), **event)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line without its time, or None where it is none of ours."""
    with suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            counts = [event[name] for name in ("done", "total") if name in event]
            if all(isinstance(count, int) for count in counts) and len(counts) in (0, 2):
                event.pop("time", None)
                return event
    return None
