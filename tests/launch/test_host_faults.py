"""Three hosts of one Ray cluster: what is lost, cut or missing is named in the stated time, and scores are exact."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.launch.cluster_case import BIN, Case, environment, events, make_case, session
from tests.launch.hosts import Hosts, hosts
from tests.launch.ray_head import wait_for

pytestmark = [pytest.mark.rare, pytest.mark.timeout(900)]
ADDRESS = "10.77.0.1:6379"
ONE_EACH = {"address": ADDRESS, "cpus_per_worker": 3, "timeout_s": 120, "start_timeout_s": 120}


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


def test_no_room_and_no_shared_folder_are_told_and_a_host_that_dies_is_done_without(three: Hosts, case: Case) -> None:
    with ray_on(three) as variables:
        crowded = case.write(
            "crowded", parallel={"dp": 4}, cluster={**ONE_EACH, "cpus_per_worker": 2, "start_timeout_s": 8}
        )
        _fails(three, variables, crowded, 1, [
            "4 workers need 2 CPUs each", "node3 (10.77.0.3) has 3 CPUs, free 3 CPUs",
            "the nodes could not take them if all were idle: lower cluster.cpus_per_worker", "(8 s)",
        ])  # fmt: skip
        apart = case.write("apart", cluster=ONE_EACH)
        _fails(three, variables, apart, 2, ["run_dir '/tmp/runs' on node", "is not the folder that node1 writes into"],
               "run_dir=/tmp/runs")  # fmt: skip

        config, run_dir = case.write("killed", cluster=ONE_EACH), case.directory / "killed"
        with session(three.command(1, BIN / "plop-dist", "score", config), variables) as driver:
            seen = wait_for(run_dir, "scoring", 24, driver)
            lost = next(event for event in seen if event["event"] == "worker" and event["host"] != "node1")
            three.do("kill", lost["host"].removeprefix("node"))
            out, err = driver.communicate(timeout=400)
        assert driver.returncode == 0, out + err
        case.assert_same_scores("killed")
        assert f"rank {lost['rank']} on {lost['host']} (10.77.0." in err
        assert "the workers are restarted, 1 of 1 times" in err
        last = [event for event in events(run_dir) if event["event"] == "worker" and event["attempt"] == 2]
        assert lost["host"] not in {event["host"] for event in last}


def test_a_head_that_dies_ends_the_run_with_a_message_and_another_cluster_goes_on(three: Hosts, case: Case) -> None:
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
    three.do("start", "1")
    with ray_on(three) as variables, session(three.command(1, BIN / "plop-dist", "score", config), variables) as driver:
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    assert "resumed: " in err
    case.assert_same_scores("headless")


def _fails(
    three: Hosts, variables: dict[str, str], config: Path, status: int, words: list[str], *overrides: str
) -> None:
    with session(three.command(1, BIN / "plop-dist", "score", config, *overrides), variables) as driver:
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == status, out + err
    for text in words:
        assert text in err.splitlines()[-1], err
    assert "Traceback" not in err
