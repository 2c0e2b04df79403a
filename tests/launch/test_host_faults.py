"""Three hosts of one Ray cluster, whose head dies while ranks score: told in the stated time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.launch.cluster_case import BIN, Case, environment, make_case, session
from tests.launch.hosts import Hosts, hosts
from tests.launch.ray_head import wait_for

pytestmark = [pytest.mark.rare, pytest.mark.timeout(900)]
ADDRESS = "10.77.0.1:6379"
ONE_EACH = {"address": ADDRESS, "cpus_per_worker": 3, "timeout_s": 120}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(3, tmp_path, style="debian") as made:
        yield made


@pytest.fixture
def case(three: Hosts) -> Case:
    return make_case(three.shared)


@contextmanager
def ray_on(three: Hosts) -> Iterator[dict[str, str]]:
    """Start Ray with 3 CPUs on each host; yield the environment of its drivers."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    variables = environment(**three.variables, **token)
    with ExitStack() as running:
        for host in (1, 2, 3):
            role = ["--head", "--port=6379"] if host == 1 else [f"--address={ADDRESS}"]
            command = three.command(
                host, BIN / "ray", "start", *role, "--block", f"--node-ip-address=10.77.0.{host}", "--num-cpus=3",
                "--object-store-memory=100000000", "--disable-usage-stats",
            )  # fmt: skip
            log = running.enter_context((three.shared / f"ray-{host}.log").open("w"))
            running.enter_context(session(command, variables, output=log))
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (three.shared / f"ray-{host}.log").read_text():
                assert time.monotonic() < deadline, (three.shared / f"ray-{host}.log").read_text()
                time.sleep(0.5)
        yield variables


def test_a_head_that_dies_ends_the_run_with_a_message(three: Hosts, case: Case) -> None:
    config, run_dir = case.write("headless", cluster=ONE_EACH), case.directory / "headless"
    with ray_on(three) as variables, session(three.command(2, BIN / "plop-dist", "score", config), variables) as driver:
        wait_for(run_dir, "scoring", 24, driver)
        three.do("kill", "1")
        began = time.monotonic()
        out, err = driver.communicate(timeout=200)
        assert time.monotonic() - began < 90
    assert driver.returncode == 1, out + err
    assert f"the Ray head at {ADDRESS} has not answered for 30 s" in err, err
    assert "Traceback" not in err
