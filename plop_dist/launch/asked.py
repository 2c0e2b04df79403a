"""Asks something of a Ray and waits for it as long as its head answers: Ray itself waits in silence, then ends us."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import ray

from plop_dist.errors import WorkerError
from plop_dist.launch import inside_ray

HEAD_WAIT_S = 30.0  # Ray ends this process without a word after 60 (RAY_gcs_rpc_server_reconnect_timeout_s)
_LOOK_S = 2.0
_AGAIN = "Run again, on another cluster too, to go on from what is on disk."

_T = TypeVar("_T")


def listens(address: str) -> bool:
    """Tell whether something listens at host:port; it does where no address is known."""
    if not address:
        return True
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
    except OSError:
        return False
    return True


class Asked(Generic[_T]):
    """What is being done in a thread of its own, which leaves signals to the one that waits for it."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._returned: list[_T] = []
        self._raised: list[Exception] = []

        def run() -> None:
            try:
                self._returned.append(work())
            except Exception as error:
                self._raised.append(error)

        self.has_ended = inside_ray.start(run)

    def outcome(self, address: str, remedy: str = _AGAIN, answers: Callable[[str], bool] = listens) -> _T:
        """Return or raise as the work does, as long as the head at this address answers.

        answers: tells whether it does. Raises WorkerError, with the remedy, where it has not for HEAD_WAIT_S.
        """
        seen = time.monotonic()
        while not self.has_ended.wait(_LOOK_S):
            if answers(address):
                seen = time.monotonic()
            elif time.monotonic() - seen > HEAD_WAIT_S:
                raise WorkerError(
                    f"the Ray head at {address} has not answered for {HEAD_WAIT_S:g} s: its process or node has ended, "
                    f"or the network to it. {remedy}"
                )
        if self._raised:
            raise self._raised.pop()  # nothing here may keep it: its frames hold Ray's controller, with the resources
        return self._returned.pop()


def answered(work: Callable[[], _T]) -> _T:
    """Return what Ray answers, or raise what it raises. Raises WorkerError where its head no longer answers."""
    return Asked(work).outcome(head_address())


def head_address() -> str:
    """Return host:port of the head that was joined; empty where a Ray client stands between, which watches itself."""
    return str(ray.get_runtime_context().gcs_address or "")
