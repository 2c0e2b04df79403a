"""The variables of srun, mpirun and other MPIs, said as torchrun says them: the processes of one step are one job.

Sources: srun(1), OUTPUT ENVIRONMENT VARIABLES; Open MPI's FAQ on environment variables; MPICH's Hydra process manager.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping

from plop_dist.errors import LayoutError
from plop_dist.ranks import LAUNCHERS, Launcher, launcher_number

_PORTS = range(20000, 30000)  # below what Linux gives out by itself


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where another launcher started this process.

    What is set already stays. Returns the launcher's name; None under torchrun and DeepSpeed's launcher, for a single
    process, and in the body of a batch script, whose allocation alone starts nothing. Raises LayoutError where the
    variables contradict each other or do not say where the ranks meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None
    for launcher in LAUNCHERS:
        if launcher.size not in environment or launcher.rank not in environment:
            continue
        size, rank = (launcher_number(environment, name) for name in (launcher.size, launcher.rank))
        if size < 2:
            return None
        if rank >= size:
            raise LayoutError(
                f"{launcher.rank} is {rank} and {launcher.size} is {size}, which do not go together; start "
                f"the ranks by {launcher.name} or unset both."
            )
        local_rank = next(
            (launcher_number(environment, name) for name in launcher.local_rank if name in environment), 0
        )
        said = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": _address(environment, launcher, size),
            "MASTER_PORT": str(_port(environment, launcher)),
        }
        for name, value in said.items():
            environment.setdefault(name, value)
        return launcher.name
    return None


def _address(environment: Mapping[str, str], launcher: Launcher, size: int) -> str:
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    hosts = [] if launcher.hosts is None else [*expanded(environment.get(launcher.hosts, ""))]
    if len(hosts) == 1 or any(environment.get(name) == str(size) for name in launcher.local_size):
        return "127.0.0.1"
    if hosts:
        return hosts[0]  # where srun puts rank 0
    raise LayoutError(
        f"{launcher.name} started {size} ranks on several hosts and does not say where they meet: give all of them "
        f"MASTER_ADDR, the name or address of the host of rank 0 (mpirun -x MASTER_ADDR=HOST, mpiexec -genv)."
    )


def _port(environment: Mapping[str, str], launcher: Launcher) -> int:
    """Return a port that all ranks of a job come to, and those of another job hardly ever."""
    job = "/".join(environment.get(name, "") for name in launcher.job)
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]


def expanded(nodes: str) -> Iterator[str]:
    """Yield the hosts of a list as SLURM writes it.

    >>> list(expanded("gpu[08-10,12],login"))
    ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login']
    """
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        before, bracket, after = entry.partition("[")
        inside, _, rest = after.partition("]")
        if not bracket:
            yield entry
            continue
        for part in inside.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from expanded(f"{before}{number:0{len(first)}d}{rest}")
