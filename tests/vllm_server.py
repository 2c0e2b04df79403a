"""A real vLLM on a CPU, in the environment that tests/exporters/vllm_environment.sh makes: where it is, a server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[1] / ".cache" / "vllm" / "bin" / "python"
needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason="no vLLM: bash tests/exporters/vllm_environment.sh .cache/vllm makes it"
)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
_START_SECONDS = 400


@dataclass(frozen=True)
class Served:
    """A server that answers at url."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it at once, with the processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(**further: str) -> dict[str, str]:
    """Return this process's environment as vLLM's own Python needs it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT | further


@contextmanager
def vllm_serving(model: Path, log: Path, *flags: str, updating: bool = True) -> Iterator[Served]:
    """Serve a model on loopback while the block runs. updating: whether adapters may be loaded as it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16",
               *flags]  # fmt: skip
    variables = environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING=str(updating))
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=variables, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
        )
    served = Served(f"http://127.0.0.1:{port}", process)
    try:
        _wait(served, log)
        yield served
    finally:
        served.kill()


def _wait(served: Served, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and served.process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{served.url}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"vLLM does not answer: {log.read_text(errors='replace')[-3000:]}")
