"""What the ranks of one launch leave on disk for the driver and for later attempts: attempts, and errors by rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from plop_dist.rundir.layout import RunDir

_SECONDS_FOR_PEERS = 5.0


def records_of(run_dir: RunDir, launch_id: str) -> Path:
    """The directory where the workers of one launch leave what the driver and later attempts need to know."""
    return run_dir.path / "ray" / launch_id


def begin_attempt(records: Path) -> int:
    """Return the number of the attempt that begins, counted from 1, or 0 if an earlier one found bad input."""
    if any(record["user"] for record in read_records(records)):
        return 0
    for path in records.glob("error-rank-*.json"):
        path.unlink()
    records.mkdir(parents=True, exist_ok=True)
    attempt = 1 + len(list(records.glob("attempt-*")))
    (records / f"attempt-{attempt}").touch()
    return attempt


def all_found_it(records: Path, world_size: int) -> bool:
    """Wait a moment for the other ranks' records; tell whether every rank found bad input.

    If so all can end in peace. If not, the others wait in a collective, and only raising makes Ray end them.
    """
    deadline = time.monotonic() + _SECONDS_FOR_PEERS
    while time.monotonic() < deadline:
        found = read_records(records)
        if len(found) == world_size:
            return all(record["user"] for record in found)
        time.sleep(0.1)
    return False


def read_records(records: Path) -> list[dict[str, Any]]:
    """Return the error records of the last attempt, the oldest, which is the cause of the others, first."""
    paths = sorted(records.glob("error-rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]
