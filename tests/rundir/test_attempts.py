"""What the ranks of a launch leave for each other: whether all of them found bad input, at a cost that is no square."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from plop_dist.errors import DataError
from plop_dist.rundir import attempts

NUM_RANKS = 6


def ask_all(records: Path, ranks: range) -> dict[int, bool]:
    """Return each rank's answer; all ask at the same time."""
    answers: dict[int, bool] = {}

    def ask(rank: int) -> None:
        answers[rank] = attempts.all_found_it(records, rank, NUM_RANKS)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_SECONDS_FOR_PEERS", 0.5)


def test_all_end_in_peace_where_all_found_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(NUM_RANKS):
        attempts.write_record(tmp_path, rank, DataError("no rows"))
    num_read = 0
    read_records = attempts.read_records

    def counted(records: Path) -> list[dict[str, object]]:
        nonlocal num_read
        num_read += 1
        return read_records(records)

    monkeypatch.setattr(attempts, "read_records", counted)
    assert ask_all(tmp_path, range(NUM_RANKS)) == dict.fromkeys(range(NUM_RANKS), True)
    assert num_read == 1, "every rank has read every record"


@pytest.mark.parametrize("alone", [0, 3])
@pytest.mark.slow
def test_one_that_found_it_alone_raises(tmp_path: Path, alone: int) -> None:
    attempts.write_record(tmp_path, alone, DataError("no rows"))
    assert ask_all(tmp_path, range(alone, alone + 1)) == {alone: False}


@pytest.mark.slow
def test_a_rank_that_failed_otherwise_spoils_the_peace(tmp_path: Path) -> None:
    for rank in range(NUM_RANKS):
        attempts.write_record(tmp_path, rank, RuntimeError("lost") if rank == 2 else DataError("no rows"))
    assert not any(ask_all(tmp_path, range(NUM_RANKS)).values())
