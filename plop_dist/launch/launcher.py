"""The variables of srun, mpirun and other MPIs, said as torchrun says them: the processes of one step are one job.

Sources: srun(1), OUTPUT ENVIRONMENT VARIABLES; Open MPI's FAQ on environment variables; MPICH's Hydra process manager.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from plop_dist.errors import LayoutError

_PORTS = range(20000, 30000)  # below what Linux gives out by itself


@dataclass(frozen=True)
class _Launcher:
    """Names of variables: how many processes, which one, which on its host, how many there, which job, which hosts."""

    name: str
    size: str
    rank: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    hosts: str | None = None


_LAUNCHERS = (
    _Launcher(
        "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"), "SLURM_STEP_NODELIST",
    ),
    _Launcher(
        "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",), ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher(
        "mpiexec", "PMI_SIZE", "PMI_RANK", ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"), ("MPI_LOCALNRANKS",),
        ("PMI_JOBID", "PALS_APID", "HYDI_CONTROL_FD"),
    ),
)  # fmt: skip


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where another launcher started this process.

    What is set already stays. Returns the launcher's name; None under torchrun and DeepSpeed's launcher, for a single
    process, and in the body of a batch script, whose allocation alone starts nothing. Raises LayoutError where the
    variables contradict each other or do not say where the ranks meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None
    for launcher in _LAUNCHERS:
        if launcher.size not in environment or launcher.rank not in environment:
            continue
        size, rank = _number(environment, launcher.size), _number(environment, launcher.rank)
        if size < 2:
            return None
        if rank >= size:
            raise LayoutError(
                f"{launcher.rank} is {rank} and {launcher.size} is {size}, which do not go together; start the ranks "
                f"by {launcher.name} or unset both."
            )
        local_rank = next((_number(environment, name) for name in launcher.local_rank if name in environment), 0)
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


def _address(environment: Mapping[str, str], launcher: _Launcher, size: int) -> str:
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


def _port(environment: Mapping[str, str], launcher: _Launcher) -> int:
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


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise LayoutError(
            f"the environment variable {name} is '{environment[name]}', expected a number; unset it or use a launcher."
        )
    return int(environment[name])
