"""One command of a case, run in this process under a time limit, and what a command that was given bad input must keep.

A command ends with exit status 0, or with 2 and one message; it never raises, prints a traceback or waits, and leaves
what it read, and where it fails all earlier results, as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

from plop_dist.cli import main

MAX_SECONDS = 20.0
_MORE_MEMORY = 6 << 30  # what one command may take before it is a finding, not a dead machine


class TimeUp(BaseException):
    """A command has waited too long; no `except Exception` keeps it."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status (None: it was stopped), both streams, and the traceback of what escaped."""

    status: int | None
    out: str
    err: str
    escaped: str = ""


def run_here(arguments: Sequence[str]) -> Outcome:
    """Run `plop-dist ARGUMENTS` in this process, its streams as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", newline="\n", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", newline="\n", write_through=True)
    status: int | None = 0
    escaped = ""
    command = ["plop-dist", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", command):
        try:
            with _time_limit():
                main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except TimeUp:
            status, escaped = None, f"still running after {MAX_SECONDS:g} s\n{_where()}"
        except BaseException as error:  # whatever it is, it is what this lane looks for
            status, escaped = 1, f"{type(error).__name__}: {str(error)[:300]!r}\n{_where()}"
    return Outcome(status, _printed(out), _printed(err), escaped)


def _printed(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def _where() -> str:
    """Return the frames of this package and the innermost one of what is being handled, each as one line."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "/plop_dist/" in frame.filename]
    return "\n".join(f"    {frame.filename}:{frame.lineno} {frame.name}" for frame in [*own, frames[-1]])


def run_apart(arguments: Sequence[str]) -> Outcome:
    """Run `plop-dist ARGUMENTS` in a process of its own, which needs some seconds only to start."""
    command = [sys.executable, "-m", "plop_dist.cli", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=4 * MAX_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "", f"still running after {4 * MAX_SECONDS:g} s")
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return Outcome(done.returncode, out, err)


def fault(outcome: Outcome) -> str | None:
    """Return what is wrong with how a command ended, or None."""
    if outcome.escaped:
        return outcome.escaped
    if "Traceback (most recent" in outcome.out + outcome.err:
        return f"a traceback was printed:\n{outcome.err[-3000:]}"
    if outcome.status == 0:
        return None
    if outcome.status != 2:
        return f"exit status {outcome.status}:\n{outcome.err[-3000:]}"
    message = outcome.err.lower().rpartition("error:")[2].strip()
    return None if len(message) > 10 else f"exit status 2 without a message:\n{outcome.err[-3000:]}"


def digests(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Return a digest of every file below a folder, but those that begin with one of `leave_out`."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (name := path.relative_to(folder).as_posix()).startswith(tuple(leave_out))
    }


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Have an allocation of many gigabytes fail with MemoryError instead of taking the machine down."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeUp in the block after MAX_SECONDS, not counting what it waited for a processor."""
    start = _waited()

    def stop(number: int, frame: FrameType | None) -> None:
        if _waited() - start > MAX_SECONDS:
            raise TimeUp

    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread alone"
    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: a first one may fall into a callback out of which nothing can be raised.
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _waited() -> float:
    """Return a clock in seconds that stands still while this thread could run, but others had the processors."""
    queued = int(Path("/proc/self/schedstat").read_text().split()[1]) if Path("/proc/self/schedstat").exists() else 0
    return time.monotonic() - queued / 1e9
