"""What the workers of one attempt have failed on, out of what they left on disk and what Ray wraps it in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import RayError

from plop_dist import errors
from plop_dist.errors import PlopError, UserError, WorkerError
from plop_dist.launch.cluster import last_line
from plop_dist.rundir.attempts import read_records


def cause(records: Path, raised: dict[int, Exception], hosts: Sequence[str] = ()) -> PlopError | None:
    """Return the first error of the last attempt as its own class.

    raised: what Ray has seen, by rank. hosts: the node of each rank.
    """
    found = read_records(records)
    if found and found[0]["user"]:
        return getattr(errors, found[0]["kind"], UserError)(found[0]["message"])
    user = next((error for _, error in sorted(raised.items()) if isinstance(error, UserError)), None)
    if user is not None:  # of a rank that does not see the run directory
        return user
    dead = sorted(rank for rank, error in raised.items() if _is_of_dead_process(error))
    if dead:
        where = f" on {hosts[dead[0]]}" if dead[0] < len(hosts) else ""
        return WorkerError(
            f"rank {dead[0]}{where}: its process died without an error of its own: killed, out of memory, or a lost "
            "node; the same command goes on from what is on disk, cluster.max_failures allows restarts"
        )
    if found:
        first, message = found[0]["rank"], found[0]["message"]
        return WorkerError(message if message.startswith("rank ") else f"rank {first}: {message}")
    for rank, error in sorted(raised.items()):
        return error if isinstance(error, PlopError) else WorkerError(f"rank {rank}: {last_line(error)}")
    return None


def before_start(error: Exception) -> UserError | None:
    """Return what a worker has found wrong with its node before it began, which Ray has wrapped."""
    failure = getattr(error, "controller_failure", None)
    found = getattr(failure, "cause", failure)
    return found if isinstance(found, UserError) else None


def found_no_room(error: Exception) -> bool:
    """Tell whether workers could not be placed in the time that Ray Train gives them."""
    # Ray Train 2.60 does not export the class of what its controller has met.
    return type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


def _is_of_dead_process(error: Exception) -> bool:
    # Ray Train 2.60 wraps what its health check has met into a class that it does not export.
    return isinstance(getattr(error, "health_check_failure", error), RayError)
