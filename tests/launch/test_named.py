"""Which errors say rank and host: what a host has met, where there are several."""

from __future__ import annotations

import pytest

from plop_dist.errors import CollectiveError, DataError, PlopError, RunDirError, WorkerError
from plop_dist.launch.named import naming_host


def said(error: PlopError, hosts: list[str], cause: Exception | None = None) -> str:
    with pytest.raises(type(error)) as raised, naming_host(hosts, 1):
        raise error from cause
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (RunDirError("cannot write x: full"), OSError("full"), "rank 1 on b: cannot write x: full"),
        (WorkerError("rank 1: train failed: its memory is gone"), None, "rank 1 on b: train failed: its memory is"),
        (CollectiveError("rank 0: merge failed"), None, "rank 0 on a: merge failed"),
        (DataError("row 3 has no field 'text'"), None, "row 3 has no field"),  # which every host finds
    ],
)
def test_rank_and_host_stand_first(error: PlopError, cause: Exception | None, expected: str) -> None:
    assert said(error, ["a", "b"], cause).startswith(expected)


def test_one_host_is_not_named() -> None:
    assert said(WorkerError("rank 1: it failed"), ["a", "a"]) == "rank 1: it failed"
