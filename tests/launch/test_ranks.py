"""What rank 0 decides holds on every rank, and what it raises too."""

from __future__ import annotations

import pytest

from plop_dist import ranks
from plop_dist.errors import DataError, WorkerError
from tests.spawn import run_ranks


class _OwnError(Exception):
    """One that cannot be pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def _decide(rank: int) -> list[str]:
    def fail(error: Exception) -> None:
        assert rank == 0, "another rank decided"
        raise error

    found = [str(ranks.agree(lambda: f"by {rank}"))]
    for error in (DataError("no rows"), _OwnError("of", "another")):
        try:
            ranks.agree(lambda error=error: fail(error))
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found


@pytest.mark.slow
def test_a_decision_and_an_error_of_rank_0_reach_every_rank() -> None:
    first, second = run_ranks(2, _decide)
    assert first == ["by 0", "DataError: no rows", "_OwnError: of another"]
    assert second == ["by 0", "DataError: no rows", "WorkerError: rank 0: _OwnError: of another"]


def test_one_process_decides_by_itself() -> None:
    assert ranks.agree(lambda: 3) == 3
    with pytest.raises(WorkerError):
        ranks.agree(_fail)


def _fail() -> None:
    raise WorkerError("why")
