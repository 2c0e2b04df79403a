"""Who writes into a run directory: one command at a time, from whatever host, and nobody who has ended.

A file names who has it. It is made by a hard link, which is there or not on every file system, NFS included, and is
touched every few seconds: whoever cannot look at the process itself, being on another host, sees by that whether it
still lives. Times are compared with those of another file beside it alone, which the same file system has set.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from plop_dist.errors import RunDirError
from plop_dist.rundir.layout import unwritable
from plop_dist.values.visible import say

TAKEN = "in_use.json"
WATCHED_WAIT_S = 10.0  # without a beat in this time the writer has ended
BEAT_S = WATCHED_WAIT_S / 5


@contextmanager
def taken(path: Path, command: str, *, makes: bool = False) -> Iterator[None]:
    """Have a run directory to this process alone for the length of a block.

    command: which of the program's, for the message. makes: whether it makes the directory where there is none; another
    command finds nothing there, and says so itself. Raises RunDirError, naming host, process and since when, where
    another process has it; one that has ended is passed over, on another host after WATCHED_WAIT_S without a sign.
    """
    file, own = path / TAKEN, _own(command)
    if not makes and not path.exists():
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        while not (_made(file, own) or _passed_over(file, own)):
            pass
    except OSError as error:
        raise unwritable(path, error) from error
    ended = threading.Event()
    threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if (_read(file) or {}).get("token") == own["token"]:
            with suppress(OSError):
                file.unlink()


def mark_of(path: Path) -> str | None:
    """Return the mark of who has a run directory, which nobody else's has; None where nobody has it."""
    found = (_read(path / TAKEN) or {}).get("token")
    return found if isinstance(found, str) else None


def _own(command: str) -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "command": command,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": _start_of(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": _machine(),
    }


def _machine() -> str:
    """Return what processes have in common that see each other's ids: one boot of one kernel, one namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _made(file: Path, own: dict[str, Any]) -> bool:
    """Tell whether the file could be made, which it can only where it is not there."""
    with _draft(file, own) as draft:
        return _linked(draft, file)


def _passed_over(file: Path, own: dict[str, Any]) -> bool:
    """Put this process's file in the place of one whose process has ended; False: look again.

    Raises RunDirError where that process lives. Of several that find the same file one may replace it: who makes the
    claim on it, and still finds it then. What is gone is not replaced: somebody else may be making it.
    """
    other = _read(file)
    if other is None:
        return False
    if _lives(file, other):
        raise RunDirError(
            f"run_dir '{file.parent}' is in use by {_said(other)}; wait for it, end it, or choose another run_dir."
        )
    claim = file.with_name(f".{file.name}.{hashlib.sha256(repr(other).encode()).hexdigest()[:16]}")
    with _draft(file, own) as draft:
        if not _linked(draft, claim):
            if not _changes(claim):  # who made it was killed in between
                claim.unlink(missing_ok=True)
            return False
        try:
            if _read(file) != other:
                return False
            os.replace(draft, file)
            return True
        finally:
            claim.unlink(missing_ok=True)


@contextmanager
def _draft(file: Path, own: dict[str, Any]) -> Iterator[Path]:
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(own, stream)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _linked(draft: Path, file: Path) -> bool:
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    return True


def _lives(file: Path, other: dict[str, Any]) -> bool:
    if other.get("machine") == _machine() and isinstance(other.get("process"), int):
        return _is_running(other["process"]) and _start_of(other["process"]) == other.get("began")
    if _is_old(file):
        return False
    say(
        f"waiting up to {WATCHED_WAIT_S:g} s to see whether {_said(other)} still writes into {file.parent}",
        to_stderr=True,
    )
    return _changes(file) and _beats(file) is not None


def _is_old(file: Path) -> bool:
    """Tell whether the last beat is long ago, by a file made now; what is not there, or a link, never beats."""
    beats = _beats(file)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as now:
        return beats is None or os.fstat(now.fileno()).st_mtime_ns - beats[1] > WATCHED_WAIT_S * 1e9


def _changes(file: Path) -> bool:
    """Tell whether something happens to a file within WATCHED_WAIT_S, or has: it is not there."""
    before, until = _beats(file), time.monotonic() + WATCHED_WAIT_S
    if before is None:
        return True
    while time.monotonic() < until:
        time.sleep(BEAT_S / 4)
        if _beats(file) != before:
            return True
    return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True


def _start_of(process: int) -> str | None:
    """Return when a process began, in the kernel's ticks, so that another one with its number is told from it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _said(other: dict[str, Any]) -> str:
    command, host, process, since = (
        str(other.get(key, "unknown"))[:80] for key in ("command", "host", "process", "since")
    )
    return f"plop-dist {command} (host {host}, process {process}, since {since})"


def _read(file: Path) -> dict[str, Any] | None:
    """Return what the file says, nothing where it is no such file or leads elsewhere; None where it is not there."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor) as stream:
            found = json.loads(stream.read(4096))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beats(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is touched or replaced; opened, because NFS looks anew at what is opened."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        return found.st_ino, found.st_mtime_ns
    finally:
        os.close(descriptor)


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(file, follow_symlinks=False)
