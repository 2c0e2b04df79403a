"""Only ours on the terminal: what libraries print while they work goes to a log file, whatever they print it with."""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from plop_dist.errors import RunDirError, UserError
from plop_dist.values.secret_texts import without_secrets
from plop_dist.values.visible import say

_Item = TypeVar("_Item")
_FIRST_FREE = 10  # descriptors that nobody closes or hands on as standard streams


@dataclass
class Options:
    """What the command line says of talk: nothing of ours but results, that of libraries as well, where theirs goes."""

    is_quiet: bool = False
    is_verbose: bool = False
    log_file: Path | None = None


options = Options()
_libraries: dict[int, TextIO] = {}


@contextmanager
def kept_apart(log: Path | None) -> Iterator[TextIO]:
    """Yield our own stderr, while descriptors 1 and 2 and Python's streams lead to the end of a log file.

    log: None keeps nothing, unless --log-file says where; with -v all goes to stderr instead. What is raised through
    the block and is no user's mistake leaves its traceback there. Raises RunDirError for a log that cannot be written.
    """
    own = _own_stderr()
    is_shown = options.is_verbose and _has_descriptor(own)
    path = None if is_shown else options.log_file or log
    target = os.dup(own.fileno()) if is_shown else _open(path)
    start = os.fstat(target).st_size
    streams = sys.stdout, sys.stderr
    _flush(*streams)
    saved = {number: _duplicate(number) for number in (1, 2)}
    for number, copy in saved.items():
        if copy is not None:  # a stream that the caller has closed stays closed
            os.dup2(target, number)
    sys.stdout, sys.stderr = _library_stream(1), _library_stream(2)
    try:
        yield own
    except Exception as error:
        if not isinstance(error, UserError):
            with suppress(OSError):
                say("".join(traceback.format_exception(error)), end="", to_stderr=True)
        raise
    finally:
        _flush(sys.stdout, sys.stderr)
        ctypes.CDLL(None).fflush(None)  # what C code has buffered would come out at the end, on our stdout
        sys.stdout, sys.stderr = streams
        for number, copy in saved.items():
            if copy is not None:
                os.dup2(copy, number)
                os.close(copy)
        os.close(target)
        if path is not None:
            _take_out_secrets(path, start)


def each_apart(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield items, in whose making libraries may talk, so that what is done with them speaks as usual."""
    iterator = iter(items)
    while True:
        with kept_apart(None):
            item = next(iterator, None)
        if item is None:
            return
        yield item


def rank_log(log: Path, rank: int) -> Path:
    """Return where the talk of one launched rank goes: beside that of the process that was started."""
    return log.with_name(f"{log.stem}-rank-{rank}{log.suffix}")


def silence_the_end() -> None:
    """Let nothing that libraries say while the interpreter ends reach the terminal; with -v only its stderr."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            if not options.is_verbose:
                os.dup2(nowhere, number)
            elif number == 1:
                os.dup2(2, number)


def _own_stderr() -> TextIO:
    """Return a stream to where sys.stderr leads now, whatever descriptor 2 becomes."""
    stream = sys.stderr
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not _has_descriptor(stream):  # a caller within this process
        return stream
    copy = fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    return os.fdopen(copy, "w", buffering=1, encoding=stream.encoding, errors="backslashreplace")


def _has_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() >= 0
    except (io.UnsupportedOperation, ValueError, AttributeError):
        return False


def _open(log: Path | None) -> int:
    try:
        if log is None:
            first = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            first = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunDirError(
            f"cannot write {log}: {error.strerror or error}; make it writable, or choose another run_dir or --log-file."
        ) from error
    copy = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    os.close(first)
    return copy


def _take_out_secrets(log: Path, start: int) -> None:
    """Rewrite what a log has got since it had `start` bytes, if there is a secret in it: a library may print one."""
    with suppress(OSError), log.open("r+b") as handle:
        handle.seek(start)
        said = handle.read().decode("utf-8", errors="replace")
        cleaned = without_secrets(said)
        if cleaned != said:
            handle.seek(start)
            handle.truncate()
            handle.write(cleaned.encode())


def _duplicate(number: int) -> int | None:
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    except OSError:
        return None


def _library_stream(number: int) -> TextIO:
    """Return the stream that libraries find as sys.stdout or sys.stderr: they keep it, so it is one and stays open."""
    if number not in _libraries:
        raw = io.FileIO(number, "w", closefd=False)
        _libraries[number] = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
    return _libraries[number]


def _flush(*streams: TextIO | None) -> None:
    for stream in streams:
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
