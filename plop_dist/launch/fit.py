"""Runs one attempt of the workers, so that an interrupt or a head that is gone ends it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import ray
from ray.train.torch import TorchTrainer

from plop_dist.errors import WorkerError
from plop_dist.launch import inside_ray

HEAD_WAIT_S = 30.0  # Ray ends this process without a word after 60 (RAY_gcs_rpc_server_reconnect_timeout_s)
_LOOK_S = 2.0
_STOP_WAIT_S = 60.0


def fit(trainer: TorchTrainer, stop_request: Path) -> None:
    """Run the workers to their end, so that an interrupt (SIGINT, connected()'s SIGTERM) raises here and ends them.

    Ray Train would answer SIGINT with its own exit, without a word to the user; it leaves signals alone in a thread.
    Workers that train are asked to stop with a checkpoint first; a second signal, or a long step, does not wait.
    Raises WorkerError where the head does not answer for HEAD_WAIT_S, and whatever Ray Train raises.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)

    has_ended = inside_ray.start(run)
    try:
        _wait(has_ended)
    except (KeyboardInterrupt, SystemExit):
        if stop_request.is_file():
            stop_request.write_text("stop")
            has_ended.wait(_STOP_WAIT_S)
        raise
    if raised:
        raise raised.pop()  # nothing here may keep it: its frames hold Ray's controller, which holds the resources


def _wait(has_ended: threading.Event) -> None:
    """Wait for the end of the workers, as long as the head answers. Raises WorkerError."""
    address = _head()
    answered = time.monotonic()
    while not has_ended.wait(_LOOK_S):
        if _answers(address):
            answered = time.monotonic()
        elif time.monotonic() - answered > HEAD_WAIT_S:
            raise WorkerError(
                f"the Ray head at {address} has not answered for {HEAD_WAIT_S:g} s: its process or node has ended, "
                "or the network to it. Run again, on another cluster too, to go on from what is on disk."
            )


def _head() -> str:
    """Return host:port of the cluster's head; empty where a Ray client stands between, which watches by itself."""
    return str(ray.get_runtime_context().gcs_address or "")


def _answers(address: str) -> bool:
    if not address:
        return True
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
    except OSError:
        return False
    return True
