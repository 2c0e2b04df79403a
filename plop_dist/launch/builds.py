"""Waits for an extension that another process builds: says so, and not for ever.

torch 2.13 keeps builds apart by a file that is there or not, and waits for it without a word and without an end; who
was killed while building has left it there (torch.utils.file_baton).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plop_dist.errors import RunDirError, WorkerError
from plop_dist.rundir.events import phase

_PATIENCE_S = 5.0


@contextmanager
def bounded_builds(limit_s: float) -> Iterator[None]:
    """Have torch wait for another's build, in this block, as long as something happens in its folder.

    limit_s: how long nothing may. Raises WorkerError after it, naming the file that stands in the way.
    """
    from torch.utils.file_baton import FileBaton

    def wait(baton: Any) -> None:
        _wait(Path(baton.lock_file_path), limit_s)

    plain = FileBaton.wait
    FileBaton.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileBaton.wait = plain  # type: ignore[method-assign]


def _wait(lock: Path, limit_s: float) -> None:
    began = changed = time.monotonic()
    newest, age_s, is_said = _newest(lock), _age_s(lock), False
    while lock.exists():
        now = time.monotonic()
        if _newest(lock) != newest:
            newest, changed, age_s = _newest(lock), now, 0.0
        idle_s = now - changed + age_s
        if idle_s > limit_s:
            raise WorkerError(
                f"{lock} says that another process builds an extension there, where nothing has changed for "
                f"{idle_s:.0f} s (cluster.start_timeout_s is {limit_s:g}): who built it was killed, most likely; "
                "delete that file and run again."
            )
        if not is_said and now - began > _PATIENCE_S:
            phase(f"waiting for another process to build {lock.parent.name}; if none does, delete {lock}")
            is_said = True
        time.sleep(0.1)


def _newest(lock: Path) -> int:
    """Return when anything in the folder was written last, by its file system's clock."""
    times = [0]
    for path in (lock.parent, *lock.parent.glob("*")):
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:  # it has just been moved
            continue
    return max(times)


def _age_s(lock: Path) -> float:
    """Return how long ago that was; by the time of a file made now, whatever the clock of this host says."""
    newest = _newest(lock)
    try:
        with tempfile.NamedTemporaryFile(dir=lock.parent.parent, prefix=".plop-dist-") as now:
            return max(0.0, (os.fstat(now.fileno()).st_mtime_ns - newest) / 1e9)
    except OSError as error:
        raise RunDirError(f"{lock.parent.parent} cannot be written: {error.strerror or error}.") from error
