"""What rank 0 decides holds on every rank, and what it raises too."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize(("backend", "waits"), [("gloo", 1), ("fake", 0)])
def test_the_end_of_a_script_waits_for_gloo_once(backend: str, waits: int) -> None:
    code = """
import atexit, sys
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # has the backend
from plop_dist import ranks

before = atexit._ncallbacks()
ranks.let_gloo_end()  # before there is a group: nothing to wait for
dist.init_process_group(sys.argv[1], store=dist.HashStore(), rank=0, world_size=1)
assert atexit._ncallbacks() == before
ranks.let_gloo_end()
ranks.let_gloo_end()
print(atexit._ncallbacks() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, backend], capture_output=True, text=True, check=True)
    assert int(done.stdout) == waits
