"""What the driver does by itself, on simulated ranks, is linear in them: placing, starting, following, collecting.

`pytest -q -s tests/launch/test_many_ranks.py` prints the cost of a rank.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.errors import DataError, WorkerError
from plop_dist.launch.causes import cause
from plop_dist.launch.rank_places import Places, find_places
from plop_dist.launch.same_files import Seen
from plop_dist.launch.workers import Launch, _Attempts
from plop_dist.rundir.attempts import begin_attempt, write_record
from plop_dist.rundir.events import EventWriter, shown


def place(directory: Path, num_ranks: int) -> None:
    found = find_places({str(node): 8 + node % 5 for node in range(num_ranks // 4)}, num_ranks, 4)
    assert found is not None
    assert not found.torn


def start(directory: Path, num_ranks: int) -> None:
    config = parse_config({"model": {"name_or_path": "m"}, "data": {"path": "d"}})
    launch = Launch("launch", config.stored(), {}, ["score"], False, "/", "/log.txt", Seen("node0", None, {}))
    attempts = _Attempts(
        config, launch, {}, {}, directory / "records", EventWriter(directory / "e"), directory / "stop"
    )
    places = Places(tuple(f"node{rank // 8}" for rank in range(num_ranks)), ())
    assert attempts._trainer({"CPU": 1.0}, places).scaling_config.num_workers == num_ranks


def follow(directory: Path, num_ranks: int) -> None:
    path = directory / f"events-{time.monotonic_ns()}.jsonl"
    writer = EventWriter(path)
    for rank in range(num_ranks):
        writer("worker", rank=rank, pid=rank, host=f"node{rank // 8}", attempt=1)
    with shown(path, io.StringIO()):
        pass


def collect(directory: Path, num_ranks: int) -> None:
    records = directory / "run" / "ray" / "launch"
    begin_attempt(records)
    for rank in range(num_ranks):
        write_record(records, rank, WorkerError(f"rank {rank}: the connection was closed"))
    assert isinstance(cause(records, {}), WorkerError)
    write_record(records, 0, DataError("no rows"))


@pytest.mark.slow
@pytest.mark.parametrize("work", [place, start, follow, collect])
def test_the_driver_s_part_is_linear_in_the_ranks(tmp_path: Path, work: Callable[[Path, int], None]) -> None:
    few, many = (_seconds(work, tmp_path, num_ranks) for num_ranks in (64, 512))
    for num_ranks, seconds in ((64, few), (512, many)):
        print(f"{work.__name__}, {num_ranks} simulated ranks: {1e6 * seconds / num_ranks:.0f} us of the CPU each")
    assert many < 8 * few * 2.5 + 0.02, f"64 ranks take {few:.4f} s of the CPU, 512 {many:.4f} s"
    assert many < 2


def _seconds(work: Callable[[Path, int], None], directory: Path, num_ranks: int) -> float:
    """Return the CPU time of the fastest of some runs."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        work(directory, num_ranks)
        taken.append(time.process_time() - began)
    return min(taken)
