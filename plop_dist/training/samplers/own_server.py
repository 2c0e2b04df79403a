"""A vLLM server of the run's own: started with the Python of another environment, and ended with the run."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.exporters.serving import VLLM
from plop_dist.training.external.interpreter import Interpreter, interpreter_of
from plop_dist.values.files import write_bytes

_ASKED_SECONDS, _ANSWER_SECONDS = 1.0, 3.0
_END_WAIT_S = 40.0
# What tells a program which rank of ours it is, and the packages of our own environment.
_NOT_ITS_OWN = ("PYTHONPATH", "PYTHONHOME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Runs between us and the server: when its standard input ends, with us or because we say so, the server ends too.
_KEEPER = """
import os, signal, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
asked = threading.Event()
def end():
    sys.stdin.buffer.read()
    asked.set()
    server.terminate()
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
ending = threading.Thread(target=end, daemon=True)
ending.start()
status = server.wait()
if asked.is_set():
    ending.join(20)
os._exit(status if status >= 0 else 128 - status)
"""


def check_own_server(config: Config) -> Interpreter:
    """Return the Python that is to serve. Raises ConfigError where it has no vLLM, or would serve other weights."""
    for key, given in (("checkpoint", config.model.checkpoint), ("quantization", config.model.quantization)):
        if given is not None:
            raise ConfigError(
                f"model.{key} is given and train.vllm.url is not, so that a vLLM would be started with the weights of "
                "model.name_or_path, which are others; start a server with yours and give its address."
            )
    interpreter = interpreter_of(config, ["vllm"])
    if interpreter.missing:
        raise ConfigError(
            "train.sampler is vllm and train.vllm.url names no server, so that one would be started, but "
            f"{interpreter} has no vllm; name the Python of an environment that has (train.engine_python), or give a "
            "server's address."
        )
    return interpreter


class OwnServer:
    """A server of model.name_or_path on loopback, which takes adapters from whoever has its key.

    highest_rank: of the adapters. Raises ConfigError where it does not answer within train.vllm.timeout_s.
    """

    def __init__(self, config: Config, highest_rank: int) -> None:
        python = check_own_server(config).path
        self.key = secrets.token_hex(16)
        self._timeout_s = config.train.vllm.timeout_s
        self._log = config.run_path / "train" / "vllm.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = _arguments(config, port, highest_rank)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN} | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": self.key, "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        write_bytes(self._log, b"")
        with self._log.open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", _KEEPER, python, *arguments],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and what it has started."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()

    def _wait(self) -> None:
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            status = self._keeper.poll()
            if status is not None:
                raise ConfigError(
                    f"train.sampler is vllm: the server that was started ended with status {status} "
                    f"({self._last_line()}); what it said is in {self._log}."
                )
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=_ANSWER_SECONDS):
                return
            time.sleep(_ASKED_SECONDS)
        raise ConfigError(
            f"train.sampler is vllm: the server that was started has not answered within train.vllm.timeout_s "
            f"({self._timeout_s:g} s); raise it, or read {self._log}."
        )

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or [line for line in lines if line.strip()] or ["nothing"]
        return " ".join(errors[-1].split())[:200]


def highest_rank(adapter: Path) -> int:
    """Return the highest rank of an adapter in PEFT's format."""
    found = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([found["r"], *found.get("rank_pattern", {}).values()])


def _arguments(config: Config, port: int, rank: int) -> list[str]:
    """Return how vLLM is started after its Python. Raises ConfigError for a rank that it does not take."""
    allowed = next((value for value in VLLM.ranks if value >= rank), None)
    if allowed is None:
        raise ConfigError(f"placement.rank: {rank} is above {VLLM.ranks[-1]}, the most that vLLM takes; lower it.")
    model, vllm = config.model, config.train.vllm
    dtype = model.dtype if vllm.dtype == "auto" else vllm.dtype
    length = [] if vllm.max_model_len is None else ["--max-model-len", str(vllm.max_model_len)]
    return [
        "-m", "vllm.entrypoints.cli.main", "serve", resolve(model.name_or_path),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype,
        "--enable-lora", "--max-lora-rank", str(allowed),
        "--tensor-parallel-size", str(vllm.tensor_parallel_size),
        "--gpu-memory-utilization", str(vllm.gpu_memory_utilization),
        # Log-probabilities of the policy that samples, at any train.temperature.
        "--logprobs-mode", "processed_logprobs",
        *length, *(["--trust-remote-code"] if model.trust_remote_code else []),
    ]  # fmt: skip
