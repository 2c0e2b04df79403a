"""SLURM's own daemons on hosts made of namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.launch.cluster_case import environment, session
from tests.launch.hosts import Hosts

CONF = """
ClusterName=plop
SlurmctldHost=node1(10.77.0.1)
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(hosts: Hosts, count: int) -> Iterator[dict[str, str]]:
    """Start a controller on host 1 and a daemon on each host; yield the variables that its commands need."""
    if not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "srun")):
        pytest.skip("slurmctld, slurmd, slurm-client and munge are not installed")
    folder = hosts.shared / "slurm"
    (folder / "state").mkdir(parents=True)
    cpus = os.cpu_count() or 1
    nodes = "\n".join(f"NodeName=node{i} NodeAddr=10.77.0.{i} CPUs={cpus} State=UNKNOWN" for i in range(1, count + 1))
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, nodes=nodes))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    variables = environment(**hosts.variables, SLURM_CONF=str(folder / "slurm.conf"))
    with ExitStack() as running:

        def start(host: int, *command: str | Path) -> None:
            log = running.enter_context((folder / f"{Path(command[0]).name}-{host}.out").open("w"))
            running.enter_context(session(hosts.command(host, *command), variables, output=log))

        munge = Path("/run/munge")  # what lies outside /tmp is the same on all hosts: one daemon is enough
        if not (munge / "munge.socket.2").exists():
            munge.mkdir(exist_ok=True)
            running.enter_context(session(["munged", "-F", "--force"], variables, output=subprocess.DEVNULL))
        for host in range(1, count + 1):
            subprocess.run(
                hosts.command(host, "mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup"), env=variables, check=True
            )
        start(1, "slurmctld", "-D", "-i")
        for host in range(1, count + 1):
            start(host, "slurmd", "-D", "-N", f"node{host}")
        _wait_until_idle(hosts, count, variables)
        yield variables


def _wait_until_idle(hosts: Hosts, count: int, variables: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    command = hosts.command(1, "sinfo", "-h", "-t", "idle", "-o", "%D")
    while True:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.stdout.strip() == str(count):
            return
        logs = "\n".join(path.read_text()[-2000:] for path in (hosts.shared / "slurm").glob("*.log"))
        assert time.monotonic() < deadline, f"SLURM's nodes did not come up: {done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.5)
