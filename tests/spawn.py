"""Run a function on several real gloo ranks, with a timeout, and report the rank that failed."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailedError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """Return function(rank, *args) of every rank, run in `world_size` spawned processes joined in a gloo group.

    `function` must be importable (module level). RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* are set as torchrun does.
    Raises RankFailedError with the traceback of the first rank that failed; no process outlives the call.
    """
    with tempfile.TemporaryDirectory() as directory:
        port = _free_port()
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_enter, args=(rank, world_size, port, directory, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(directory), timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(directory) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[Any], directory: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            time.sleep(0.5)  # let the first cause reach its file
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RankFailedError(f"ranks {alive} did not end within {timeout_s} s")
        time.sleep(0.02)
    errors = sorted(directory.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    if errors:
        raise RankFailedError(f"rank {errors[0].stem.split('-')[1]} failed:\n{errors[0].read_text()}")
    died = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode not in (None, 0)}
    if died:
        raise RankFailedError(f"ranks died with exit codes {died}")


def _enter(rank: int, world_size: int, port: int, directory: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        torch.save(function(rank, *args), Path(directory) / f"result-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(directory) / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
