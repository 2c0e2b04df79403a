"""How events are shown: bars and running times on a terminal, elsewhere plain lines as it goes on."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any, TextIO

from plop_dist.rundir import talk
from plop_dist.values.visible import visible

_LABEL = {"baseline": "baselines of modules", "scoring": "samples scored", "training": "training steps"}
_LINE_SECONDS = 5.0
_PHASE_LINE_SECONDS = 10.0
_LONG_PHASE_SECONDS = 2.0


class EventDisplay:
    """Shows events on a stream. A phase lasts until another phase, a stage or a count begins."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from plop_dist.values.console import VisibleConsole

        self._stream = stream = stream or sys.stderr
        console = VisibleConsole(file=stream)
        is_live = console.is_terminal and not console.is_dumb_terminal and not talk.options.is_quiet
        self._bars = _Bars(console) if is_live else None
        self._shown: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None
        self._next_line = 0.0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> EventDisplay:
        if self._bars is not None:
            self._bars.live.start()
        else:
            self._ticking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock:
            self._end_phase()
        if self._bars is not None:
            self._bars.live.stop()

    def __call__(self, kind: str, **fields: Any) -> None:
        """Show one event."""
        with self._lock:
            if kind in ("phase", "stage") or kind in _LABEL:
                self._end_phase()
            if kind == "phase":
                self._begin_phase(fields.get("text", ""))
            elif "done" in fields and kind in _LABEL:
                self._progress(kind, fields["done"], fields["total"], fields.get("note", ""))
            else:
                self._line(_sentence(kind, fields))

    def _begin_phase(self, text: str) -> None:
        now = time.monotonic()
        self._phase, self._next_line = (text, now), now + _PHASE_LINE_SECONDS
        if self._bars is not None:
            self._bars.begin_phase(text)
        else:
            self._line(text)

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        (text, began), self._phase = self._phase, None
        seconds = time.monotonic() - began
        if self._bars is not None:
            self._bars.end_phase()
        if seconds >= _LONG_PHASE_SECONDS:
            self._line(f"{text}: {seconds:.1f} s")

    def _tick(self) -> None:
        """Say of a long phase, where no clock runs on the screen, that it still goes on."""
        while not self._ended.wait(0.5):
            with self._lock:
                now = time.monotonic()
                if self._phase is not None and now >= self._next_line:
                    text, began = self._phase
                    self._next_line += max(_PHASE_LINE_SECONDS, (now - began) / 2)
                    self._line(f"{text}: {now - began:.0f} s so far")

    def _progress(self, kind: str, done: int, total: int, note: str) -> None:
        if self._bars is not None:
            self._bars.update(kind, done, total, f"{_LABEL[kind]} {note}")
            return
        now = time.monotonic()
        if done == total or now - self._shown.setdefault(kind, now - _LINE_SECONDS + 2) >= _LINE_SECONDS:
            self._shown[kind] = now
            self._line(f"{_LABEL[kind]}: {done}/{total} {note}".rstrip())

    def _line(self, text: str) -> None:
        is_warning = text.startswith("warning: ")
        if talk.options.is_quiet and not is_warning:
            return
        if self._bars is not None:
            self._bars.live.console.print(text, highlight=False, markup=False)
            return
        with suppress(OSError, ValueError):  # `2>&1 | head` must not cost the run; events.jsonl has every line
            self._stream.write(visible(text) + "\n")
            self._stream.flush()


class _Bars:
    """What moves on a terminal: a bar for each count, and below them the phase with its running time."""

    def __init__(self, console: Any) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        text = TextColumn("{task.description}", markup=False)
        self._counts = Progress(text, BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        self._phases = Progress(SpinnerColumn(), text, TimeElapsedColumn())
        self._tasks: dict[str, Any] = {}
        both = Group(self._counts, self._phases)
        self.live = Live(both, console=console, refresh_per_second=5, redirect_stdout=False, redirect_stderr=False)

    def begin_phase(self, text: str) -> None:
        self._tasks["phase"] = self._phases.add_task(text, total=None)

    def end_phase(self) -> None:
        self._phases.remove_task(self._tasks.pop("phase"))

    def update(self, kind: str, done: int, total: int, text: str) -> None:
        if kind not in self._tasks:
            self._tasks[kind] = self._counts.add_task(text, total=total)
        self._counts.update(self._tasks[kind], completed=done, total=total, description=text)


def _sentence(kind: str, fields: dict[str, Any]) -> str:
    if kind == "resumed":
        return f"resumed: {fields['done']} of {fields['total']} samples were scored before"
    if kind == "stable":
        sure = f"the selection is {fields['confidence']:.0%} sure"
        return f"stopped after {fields['done']} of {fields['total']} samples: {sure}"
    return fields.get("text") or f"{kind}: " + ", ".join(f"{key} {value}" for key, value in fields.items())
