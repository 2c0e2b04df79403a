"""A Ray cluster over hosts made of namespaces, whose nodes are killed, cut off and started again."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch.cluster_case import BIN, environment, session
from tests.launch.hosts import Hosts

ADDRESS = "10.77.0.1:6379"
_STARTS_S = 120


@dataclass
class RayHosts:
    """A head on host 1, which runs no rank, and a node of 3 CPUs on each other host."""

    hosts: Hosts
    variables: dict[str, str]
    running: ExitStack
    nodes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, host: int, **more: str) -> None:
        """Start Ray on a host."""
        role = ["--head", "--port=6379", "--num-cpus=0"] if host == 1 else [f"--address={ADDRESS}", "--num-cpus=3"]
        command = self.hosts.command(
            host, BIN / "ray", "start", *role, "--block", f"--node-ip-address=10.77.0.{host}",
            "--object-store-memory=100000000", "--disable-usage-stats",
        )  # fmt: skip
        path = self.hosts.shared / f"ray-{host}-{uuid.uuid4().hex[:8]}.log"
        log = self.running.enter_context(path.open("w"))
        self.nodes[host] = self.running.enter_context(session(command, {**self.variables, **more}, output=log))
        deadline = time.monotonic() + _STARTS_S
        while "Ray runtime started" not in path.read_text():
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.2)

    def mend(self) -> None:
        """Start again what was killed, and Ray where it has ended."""
        for host, node in list(self.nodes.items()):
            if not Path(self.hosts.variables["HOSTS_DIR"], f"host{host}", "init.pid").exists():
                self.hosts.do("start", str(host))
            if node.poll() is not None:
                self.start(host)

    def command(self, host: int, *command: str | Path) -> list[str]:
        """Return what runs a command on a host."""
        return self.hosts.command(host, *command)


@contextmanager
def ray_on(made: Hosts, count: int) -> Iterator[RayHosts]:
    """Start Ray on hosts 1 to `count`, with a token of its own."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    with ExitStack() as running:
        cluster = RayHosts(made, environment(**made.variables, **token), running)
        for host in range(1, count + 1):
            cluster.start(host)
        yield cluster
