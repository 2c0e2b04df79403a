"""What the ranks of one launch leave on disk for the driver and for later attempts: attempts, and errors by rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plop_dist.errors import UserError
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import make_folder, write_json
from plop_dist.values.secret_texts import without_secrets


def records_of(run_dir: RunDir, launch_id: str) -> Path:
    """The directory where the workers of one launch leave what the driver and later attempts need to know."""
    return run_dir.path / "ray" / launch_id


def begin_attempt(records: Path) -> int:
    """Return the number of the attempt that begins, counted from 1; records of earlier ones are taken away."""
    for path in _paths(records):
        path.unlink()
    make_folder(records, records.parent.parent)
    attempt = 1 + len(list(records.glob("attempt-*")))
    (records / f"attempt-{attempt}").touch()
    return attempt


def write_record(records: Path, rank: int, error: Exception, hide: Callable[[str], str] = str) -> None:
    """Leave what a rank has failed on, without what `hide` takes out (Config.hide). Raises RunDirError."""
    message = without_secrets(hide(str(error)))
    record = {"rank": rank, "kind": type(error).__name__, "message": message, "user": isinstance(error, UserError)}
    write_json(records / f"error-rank-{rank}.json", record)


def read_records(records: Path) -> list[dict[str, Any]]:
    """Return the error records of the last attempt, the oldest, which is the cause of the others, first."""
    paths = sorted(_paths(records), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


def _paths(records: Path) -> list[Path]:
    return list(records.glob("error-rank-*.json"))
