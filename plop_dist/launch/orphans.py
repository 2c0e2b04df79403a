"""Ends a worker whose driver has gone, before another run writes into the same directory.

Ray ends workers of a driver that is lost only while it has a head: on other nodes they would go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plop_dist.rundir.taken import BEAT_S, WATCHED_WAIT_S, mark_of

STATUS = 75  # EX_TEMPFAIL: the next run goes on


@contextmanager
def ending_with_driver(run_dir: Path, mark: str | None) -> Iterator[None]:
    """End this process, in the block, once another run has the directory, or nobody has for WATCHED_WAIT_S.

    mark: that of the driver; None: no one has the directory, and nothing is watched.
    """
    has_ended = threading.Event()
    if mark is not None:
        threading.Thread(target=_watch, args=(run_dir, mark, has_ended), daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def _watch(run_dir: Path, mark: str, has_ended: threading.Event) -> None:
    seen = time.monotonic()
    while not has_ended.wait(BEAT_S):
        found = mark_of(run_dir)
        if found == mark:
            seen = time.monotonic()
        elif found is not None or time.monotonic() - seen > WATCHED_WAIT_S:
            os._exit(STATUS)
