"""A worker whose driver has gone does not write beside the next run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from plop_dist.launch.orphans import STATUS
from plop_dist.rundir.taken import BEAT_S, WATCHED_WAIT_S, mark_of, taken

WORKER = """
import sys, time
from pathlib import Path
from plop_dist.launch.orphans import ending_with_driver
with ending_with_driver(Path(sys.argv[1]), sys.argv[2]):
    print("works", flush=True)
    time.sleep(60)
"""


def worker(run_dir: Path) -> subprocess.Popen[str]:
    """Start a worker of who has the run directory now, and wait until it works."""
    command = [sys.executable, "-c", WORKER, str(run_dir), str(mark_of(run_dir))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    return process


@pytest.mark.slow
def test_it_ends_soon_after_its_driver_and_at_once_where_another_begins(tmp_path: Path) -> None:
    with taken(tmp_path / "run", "score", makes=True):
        first, second = worker(tmp_path / "run"), worker(tmp_path / "run")
        time.sleep(1.5 * BEAT_S)
        assert first.poll() is None, "it ended while its driver lives"
        second.kill()
    with taken(tmp_path / "run", "score"):
        assert first.wait(3 * BEAT_S) == STATUS
        third = worker(tmp_path / "run")
    assert third.wait(2 * WATCHED_WAIT_S) == STATUS
