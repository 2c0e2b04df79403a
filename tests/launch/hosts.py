"""Hosts made of namespaces on this machine: own network, names, process ids and /tmp, and a folder that all share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.cluster_case import environment, session

SCRIPT = Path(__file__).with_name("hosts.sh")


@dataclass(frozen=True)
class Hosts:
    """Hosts 1, 2, ...; `shared` is a folder that all of them have, the rest of /tmp is each one's own."""

    shared: Path
    variables: dict[str, str]

    def command(self, host: int, *command: str | Path) -> list[str]:
        """Return what runs a command on a host."""
        return ["bash", str(SCRIPT), "exec", str(host), *map(str, command)]

    def do(self, *command: str) -> None:
        """Cut, mend, kill or start a host."""
        subprocess.run(["bash", str(SCRIPT), *command], env={**os.environ, **self.variables}, check=True, timeout=60)

    def together(
        self, commands: Sequence[Sequence[str | Path]], timeout_s: float = 120, **more: str
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run one command on each host, all at once."""
        variables = environment(**self.variables, **more)
        with all_at_once(self, commands, variables) as processes:
            said = [process.communicate(timeout=timeout_s) for process in processes]
        return [
            subprocess.CompletedProcess(process.args, process.returncode, out, err)
            for process, (out, err) in zip(processes, said, strict=True)
        ]


@contextmanager
def hosts(count: int, directory: Path, style: str = "good") -> Iterator[Hosts]:
    """Make hosts, and end them and all that runs on them. Skips where this machine does not let one."""
    _skip_where_impossible()
    shared = directory / "shared"
    shared.mkdir(exist_ok=True)
    variables = {"HOSTS_DIR": str(directory / "hosts"), "HOSTS_SHARE": str(shared), "HOSTS_STYLE": style}
    made = Hosts(shared, variables)
    try:
        made.do("up", str(count))
        for host in range(1, count + 1):
            made.do("start", str(host))
        yield made
    finally:
        made.do("down")


def _skip_where_impossible() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("hosts of namespaces need root, iproute2 and util-linux")
    if SCRIPT.is_relative_to("/tmp"):
        pytest.skip("each of these hosts has a /tmp of its own, without this checkout")
    tried = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not allowed here: {tried.stderr.decode().strip()}")
    if subprocess.run(["ip", "link", "show", "plopbr"], capture_output=True, check=False).returncode == 0:
        pytest.skip("another test has hosts of namespaces on this machine")


@contextmanager
def all_at_once(
    made: Hosts, commands: Sequence[Sequence[str | Path]], variables: dict[str, str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start one command on each host, and end them afterwards."""
    if not commands:
        yield []
        return
    with (
        session(made.command(len(commands), *commands[-1]), variables) as last,
        all_at_once(made, commands[:-1], variables) as before,
    ):
        yield [*before, last]
