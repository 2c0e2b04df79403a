"""Which rank this process is: reads the launcher's environment, joins the process group, and leaves it."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from plop_dist.errors import ConfigError, LayoutError, PlopError, WorkerError, first_line
from plop_dist.values.interface import LOOPBACK, address_towards, interface_with, is_loopback, name_is_loopback

if TYPE_CHECKING:
    from plop_dist.config.schema import Config  # pydantic, which every command's --help would wait for

_T = TypeVar("_T")
_GLOO_ENDS_S = 0.1


@dataclass(frozen=True)
class Launcher:
    """Names of the variables of a launcher other than torchrun and DeepSpeed's.

    How many processes, which one, which on its host, how many there, which job, which hosts.
    """

    name: str
    size: str
    rank: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    hosts: str | None = None


LAUNCHERS = (
    Launcher(
        "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"), "SLURM_STEP_NODELIST",
    ),
    Launcher(
        "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",), ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "mpiexec", "PMI_SIZE", "PMI_RANK", ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"), ("MPI_LOCALNRANKS",),
        ("PMI_JOBID", "PALS_APID", "HYDI_CONTROL_FD"),
    ),
)  # fmt: skip


def launched_ranks() -> int | None:
    """Return the number of ranks that torchrun or the DeepSpeed launcher started, or None outside a launcher."""
    return launcher_number(os.environ, "WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def said_ranks() -> tuple[str, int] | None:
    """Return which variable of the environment says how many ranks were started beside this one, and how many.

    None where no launcher has started this process: an allocation alone (SLURM_NTASKS) starts nothing.
    """
    for size, place in (("WORLD_SIZE", "RANK"), *((launcher.size, launcher.rank) for launcher in LAUNCHERS)):
        if size in os.environ and place in os.environ:
            return size, launcher_number(os.environ, size, 1)
    return None


def rank() -> int:
    """Return this process's global rank, 0 where there is only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else launcher_number(os.environ, "RANK", 0)


def local_device() -> int:
    """Return which of the GPUs that this process sees is its own: by its rank on this host, as its launcher says.

    Device 0 where the scheduler shows each process one GPU alone. Raises LayoutError for more ranks than GPUs.
    """
    import torch

    local_rank, count = launcher_number(os.environ, "LOCAL_RANK", 0), torch.cuda.device_count()
    if count == 1:
        return 0
    if local_rank >= count:
        raise LayoutError(
            f"rank {rank()} is number {local_rank} on its host (LOCAL_RANK), which shows it {count} GPUs; start "
            "at most as many ranks there as it has GPUs."
        )
    return local_rank


def launcher_number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    """Return a number that a launcher has put into the environment. Raises LayoutError for what is none."""
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise LayoutError(
            f"the environment variable {name} is '{text}', expected a number; unset it or use a launcher."
        )
    return int(text)


@contextmanager
def joined(config: Config) -> Iterator[int]:
    """Join the process group that the layout needs and yield this process's rank.

    gloo on the CPU, nccl with GPUs; every collective waits at most cluster.timeout_s. A group that is already there
    (Ray Train's) is used and left as it is. Raises LayoutError if the number of ranks is not the layout's.
    """
    import torch
    import torch.distributed as dist

    needed = config.parallel.world_size
    started = dist.get_world_size() if dist.is_initialized() else launched_ranks() or 1
    if started != needed:
        raise LayoutError(
            f"{config.parallel.layout.product_text} = {needed}, but {started} rank(s) were started; start {needed} or "
            "change the parallel section."
        )
    created = needed > 1 and not dist.is_initialized()
    if created:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(local_device())
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        try:
            _init_group(backend, timedelta(seconds=config.cluster.timeout_s))
        except (RuntimeError, ValueError, OSError) as error:  # a store that does not answer, variables that are missing
            raise ConfigError(_no_group(error, config)) from error
    try:
        yield rank()
    finally:
        if created and dist.is_initialized():
            dist.destroy_process_group()


def _init_group(backend: str, timeout: timedelta) -> None:
    """Join the process group, through the interface that reaches the other hosts where gloo would not find it."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

    store, own, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if "GLOO_SOCKET_IFNAME" not in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != str(world_size):
        address = address_towards(os.environ["MASTER_ADDR"]) or LOOPBACK
        store.set(f"plop-dist/address/{own}", address)
        if name_is_loopback():
            _name_interface(address, [store.get(f"plop-dist/address/{rank}").decode() for rank in range(world_size)])
    dist.init_process_group(
        backend, store=PrefixStore("plop-dist", store), rank=own, world_size=world_size, timeout=timeout
    )


def _name_interface(address: str, everyone: list[str]) -> None:
    """Have gloo take the interface that reaches the others: the first rank's host finds it by where they are."""
    others = [other for other in everyone if not is_loopback(other)]
    if not others:
        return  # all are on this host
    if is_loopback(address):
        address = address_towards(others[0]) or LOOPBACK
    interface = interface_with(address)
    if interface is None or is_loopback(address):
        raise ConfigError(
            f"rank {rank()} on {socket.gethostname()} finds no network interface that reaches {others[0]}, and its "
            "host's name leads to itself; "
            "set GLOO_SOCKET_IFNAME to the interface's name (ip -brief address)."
        )
    os.environ["GLOO_SOCKET_IFNAME"] = interface


def _no_group(error: Exception, config: Config) -> str:
    """Return what is wrong with the launcher's address, in one message for all that can be."""
    address = f"{os.environ.get('MASTER_ADDR', '(unset)')}:{os.environ.get('MASTER_PORT', '(unset)')}"
    text, own = str(error), f"rank {rank()}"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(config.parallel.world_size):
        own += f" on {socket.gethostname()}"
    if "EADDRINUSE" in text:
        return (
            f"MASTER_PORT: {own} cannot listen on {address}, because another process does; give the launcher a "
            "free port (torchrun --master-port, deepspeed --master_port, or the variable MASTER_PORT)."
        )
    if "environment variable" in text:
        return f"{own} cannot join the others: {first_line(error)}; start the ranks with torchrun or alike."
    return (
        f"{own} of {config.parallel.world_size} ranks cannot join the others at {address} (MASTER_ADDR, MASTER_PORT) "
        f"within cluster.timeout_s ({config.cluster.timeout_s:g}): {first_line(error)}; start all ranks, and give an "
        "address that they reach."
    )


def barrier() -> None:
    """Return once every rank is here: what rank 0 has written before can then be read. Collective over the world."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def let_gloo_end() -> None:
    """Have the end of a process that others have written wait for gloo's threads, a tenth of a second.

    One of them that lets go of a collective's tensor while the interpreter ends aborts it ("terminate called without an
    active exception"): it asks for the interpreter's lock, which torch 2.13 survives before the end alone.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend_config():
        _wait_at_end()


@cache
def _wait_at_end() -> None:
    atexit.register(time.sleep, _GLOO_ENDS_S)


def gathered(value: _T) -> list[_T]:
    """Return every rank's value, in the order of the ranks. Collective over the world."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def agree(decide: Callable[[], _T]) -> _T:
    """Return rank 0's decision on every rank; only rank 0 decides. Collective over the world.

    What rank 0 raises is raised on every rank, so that nobody waits for it.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return decide()
    box: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except Exception as error:
            cause = error
            # Other ranks may not be able to unpickle what is none of ours.
            is_ours = isinstance(error, PlopError)
            box[1] = error if is_ours else WorkerError(f"rank 0: {type(error).__name__}: {error}")
    dist.broadcast_object_list(box, src=0)
    if cause is not None:
        raise cause
    if box[1] is not None:
        raise box[1]
    return box[0]
