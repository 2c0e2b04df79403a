"""A Ray started by hand, as on a cluster, and the killing of one of its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster_case import BIN, environment, events, free_ports, session


@dataclass(frozen=True)
class Head:
    """Where drivers and job clients find a Ray started by hand."""

    address: str
    dashboard: str


@contextmanager
def ray_head(*options: str, num_cpus: int = 4, port: int | None = None, **more: str) -> Iterator[Head]:
    """Start a Ray head and give drivers started in the block the token that it asks for; ended on leaving.

    options: further ones of `ray start`. more: further variables of its environment.
    """
    with pytest.MonkeyPatch.context() as variables:  # the drivers are this process and its children
        variables.setenv("RAY_AUTH_MODE", "token")
        variables.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
        yield from _head([*options, f"--num-cpus={num_cpus}"], port, more)


def kill_rank_1_in_the_middle(run_dir: Path, kind: str, least: int, driver: subprocess.Popen[str]) -> None:
    """SIGKILL the newest process of rank 1 once `least` of the samples or steps are done, and not yet all."""
    seen = wait_for(run_dir, kind, least, driver)
    os.kill([event["pid"] for event in seen if event["event"] == "worker" and event["rank"] == 1][-1], signal.SIGKILL)


def wait_for(run_dir: Path, kind: str, least: int, driver: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Return the events so far once `least` of the samples or steps are done, and not yet all."""
    while True:
        assert driver.poll() is None, driver.communicate()
        seen = events(run_dir)
        progress = [event for event in seen if event["event"] == kind]
        if progress and progress[-1]["done"] >= least:
            assert progress[-1]["done"] < progress[-1]["total"], f"{kind} ended before it could be interrupted"
            return seen
        time.sleep(0.01)


def _head(options: list[str], given_port: int | None, more: dict[str, str]) -> Iterator[Head]:
    free, dashboard, client, agent = free_ports(4)
    port = given_port or free
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as directory:  # short: sockets
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--temp-dir={directory}", "--disable-usage-stats", *options,
        ]  # fmt: skip
        at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # else it waits 30 s for peers when it is to end
        with session(command, environment(**at_once, **more), output=subprocess.DEVNULL) as process:
            url = f"http://127.0.0.1:{dashboard}"
            deadline = time.monotonic() + 90
            while not _answers(url):
                assert process.poll() is None, "ray start --head ended"
                assert time.monotonic() < deadline, "ray start --head did not come up"
                time.sleep(0.2)
            yield Head(f"127.0.0.1:{port}", url)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it asks for a token
    except (urllib.error.URLError, OSError):
        return False
    return True
