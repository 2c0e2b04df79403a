"""What is installed here and whether it works: probes with a time limit, each in its own process; no secrets."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from plop_dist import __version__
from plop_dist.errors import PlopError
from plop_dist.registry import BACKENDS, load, names

Status = Literal["ok", "absent", "failed"]

_PACKAGES = (
    "torch", "transformers", "numpy", "pydantic", "safetensors", "accelerate", "peft", "trl", "datasets", "deepspeed",
    "megatron-core", "megatron-bridge", "transformer-engine", "ray", "vllm",
)  # fmt: skip
_NEEDS = {"deepspeed": ("deepspeed",), "megatron": ("megatron.core", "megatron.bridge")}
# Their names alone: a value may be a secret, or the name of a machine.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "MASTER_ADDR",
    "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "RANK", "RAY_ADDRESS", "SLURM_JOB_ID", "TORCH_EXTENSIONS_DIR",
    "WORLD_SIZE",
)  # fmt: skip

_DEVICES = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or "no CUDA device: ranks run on the CPU")
"""
_GLOO = """
import os, sys, tempfile, torch, torch.distributed as dist, torch.multiprocessing as mp
from datetime import timedelta
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo") if os.path.exists("/sys/class/net/lo") else None
def rank(index, path):
    store = f"file://{path}"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=2, timeout=timedelta(seconds=30))
    value = torch.tensor([index + 1.0])
    dist.all_reduce(value)
    assert value.item() == 3.0
    dist.barrier()
    os._exit(0)
with tempfile.TemporaryDirectory() as folder:
    context = mp.get_context("fork")
    ranks = [context.Process(target=rank, args=(index, f"{folder}/store")) for index in range(2)]
    [process.start() for process in ranks]
    [process.join(40) for process in ranks]
    codes = [process.exitcode for process in ranks]
    [process.kill() for process in ranks if process.exitcode is None]
print("two ranks summed a tensor" if codes == [0, 0] else f"the ranks ended with {codes}")
sys.exit(codes != [0, 0])
"""
_RAY = """
import logging, ray
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
assert ray.get(ray.remote(lambda: 3).remote()) == 3
ray.shutdown()
print("a local Ray ran a task")
"""


@dataclass(frozen=True)
class Finding:
    """One line of the table: absent is what is not installed, which only matters to those who want it."""

    what: str
    status: Status
    text: str


def examine() -> Iterator[Finding]:
    """Yield what is found, one after the other, as each probe ends; two minutes at most."""
    yield Finding("plop-dist", "ok", f"{__version__}, Python {platform.python_version()}")
    yield Finding("machine", "ok", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_memory()}")
    for name in _PACKAGES:
        yield _package(name)
    for name in names(BACKENDS):
        yield _backend(name)
    yield probe("devices", _DEVICES, limit_s=30)
    yield Finding("interfaces", "ok", ", ".join(name for _, name in socket.if_nameindex()))
    given = ", ".join(name for name in _VARIABLES if name in os.environ)
    yield Finding("variables", "ok", f"{given or 'none'} set (values are not shown)")
    yield probe("gloo", _GLOO, limit_s=50)
    if find_spec("ray") is None:
        yield Finding(
            "Ray", "absent", "not installed: pip install 'plop-dist[ray]' for several ranks without a launcher"
        )
    else:
        yield probe("Ray", _RAY, limit_s=60)


def probe(what: str, program: str, limit_s: float) -> Finding:
    """Return what a program says in its last line; that it failed, or did not end in time, is a finding too."""
    begun = time.monotonic()
    # Started anew, so that nothing that hangs or crashes takes this process with it; ranks of a launcher are others.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")
    }
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end_group(process.pid)
            return Finding(what, "failed", f"no answer within {limit_s:g} s")
    seconds = f" ({time.monotonic() - begun:.1f} s)"
    if process.returncode:
        lines = (out + err).strip().splitlines() or [f"status {process.returncode}"]
        return Finding(what, "failed", lines[-1][:200] + seconds)
    return Finding(what, "ok", (out.strip().splitlines() or [""])[-1] + seconds)


def _end_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "absent", "not installed")


def _backend(name: str) -> Finding:
    what = f"backend {name}"
    try:
        record = load(BACKENDS, name)
    except PlopError as error:
        return Finding(what, "failed", str(error))
    missing = [package for package in _NEEDS.get(name, ()) if not _is_there(package)]
    if missing:
        text = f"{', '.join(missing)} not installed: pip install 'plop-dist[{name}]'"
        return Finding(what, "absent", text)
    return Finding(what, "ok", record.summary)


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError):
        return "memory unknown"
