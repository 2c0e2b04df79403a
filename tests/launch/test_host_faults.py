"""Four hosts of one Ray cluster: what is lost, cut, full or missing is named in time, and results are exact."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster_case import BIN, ROOT, Case, environment, events, make_case, session
from tests.launch.hosts import hosts
from tests.launch.ray_head import wait_for
from tests.launch.ray_hosts import ADDRESS, RayHosts, ray_on

pytestmark = [pytest.mark.rare, pytest.mark.timeout(900)]
NOTICED_S = (
    120  # until a lost node is known, the ranks are on another and have started: the table of waits says 60 + 60
)
TRAINING = {"method": "sft", "max_steps": 12, "learning_rate": 1e-2, "micro_batch_size": 2, "max_length": 48,
            "eval_samples": 8, "prompt_template": "{question} ", "save_steps": 3}  # fmt: skip

# Python runs sitecustomize.py at its start: here a rank is long at writing the last file of the second checkpoint.
SLOW_WRITER = """
import builtins, pathlib, socket, time
plain, mark = builtins.open, pathlib.Path({mark!r})

def slow(file, *how, **more):
    if str(file).endswith("checkpoint-6/trainer_state.json") and "w" in how and not mark.exists():
        mark.write_text(socket.gethostname())
        time.sleep(60)
    return plain(file, *how, **more)

builtins.open = slow
"""


# libfaketime makes Python's sleep fail (clock_nanosleep: EINVAL), and Ray with it: here Python's clock alone is ahead.
LATE_CLOCK = """
import socket, time
if socket.gethostname() == "node4":
    plain = time.time
    time.time = lambda: plain() + 3600
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    with hosts(4, tmp_path_factory.mktemp("faults"), style="debian") as made, ray_on(made, 4) as running:
        yield running


@pytest.fixture(scope="module")
def case(cluster: RayHosts) -> Case:
    return make_case(cluster.hosts.shared)


@pytest.fixture
def whole(cluster: RayHosts) -> RayHosts:
    """The cluster with all of its nodes."""
    cluster.mend()
    return cluster


def start(
    cluster: RayHosts, case: Case, name: str, command: str = "score", *, dp: int = 2, on: int = 1, **sections: Any
) -> Any:
    """Start a command on a host; each rank takes a node."""
    more = sections.pop("variables", {})
    config = case.write(
        name,
        parallel={"backend": "transformers", "zero_stage": 0, "dp": dp},
        cluster={"address": ADDRESS, "cpus_per_worker": 3, "timeout_s": 100, "start_timeout_s": 120},
        **sections,
    )
    return session(cluster.command(on, BIN / "plop-dist", command, config), {**cluster.variables, **more})


def host_of(seen: list[dict[str, Any]], rank: int, attempt: int = 1) -> str:
    """Return the host of a rank."""
    workers = [event for event in seen if event["event"] == "worker" and event["attempt"] == attempt]
    return next(event["host"] for event in workers if event["rank"] == rank)


def goes_on(driver: Any, run_dir: Path, lost: str, rank: int = 1) -> str:
    """Assert that the run ends well without the host of a rank, naming it, in time; return what it said."""
    began = time.time()
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    restarted = next(event for event in events(run_dir) if "the workers are restarted" in event.get("text", ""))
    assert restarted["time"] - began < NOTICED_S
    assert f"rank {rank} on {lost} (10.77.0.{lost[-1]}): its process died" in err, err
    assert "the workers are restarted, 1 of 1 times" in err
    assert "Traceback" not in err
    last = [event for event in events(run_dir) if event["event"] == "worker" and event["attempt"] == 2]
    assert len(last) == 2
    assert lost not in {event["host"] for event in last}
    return err


@pytest.mark.parametrize("fault", ["kill", "cut", "cut for a minute"])
def test_a_node_that_is_lost_while_scoring(whole: RayHosts, case: Case, fault: str) -> None:
    name = fault.replace(" ", "-")
    with start(whole, case, name) as driver:
        lost = host_of(wait_for(case.directory / name, "scoring", 8, driver), 1)
        whole.hosts.do(fault.split()[0], lost[-1])
        mend = threading.Timer(60, whole.hosts.do, ("mend", lost[-1]))
        if fault == "cut for a minute":
            mend.start()
        try:
            err = goes_on(driver, case.directory / name, lost)
        finally:
            mend.cancel()
            if fault != "kill":
                whole.hosts.do("mend", lost[-1])
                whole.hosts.do("kill", lost[-1])  # its Ray takes long to see that it was given up
    assert "resumed: " in err
    case.assert_same_scores(name, rtol=1e-6)


@pytest.fixture(scope="module")
def calm(cluster: RayHosts, case: Case) -> dict[str, Any]:
    """The summary of a training that nothing happens to."""
    cluster.mend()
    with start(cluster, case, "calm", "run", train=TRAINING) as driver:
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    return json.loads((case.directory / "calm" / "train" / "summary.json").read_text())


def assert_trained_alike(run_dir: Path, calm: dict[str, Any]) -> None:
    got = json.loads((run_dir / "train" / "summary.json").read_text())
    for key in ("held_out_before", "held_out_after"):
        assert got[key] == pytest.approx(calm[key], abs=1e-4)
    steps = [event["done"] for event in events(run_dir) if event["event"] == "training"]
    assert steps[-1] == 12
    assert steps.count(1) == 1, f"training began again from the first step: {steps}"


def test_a_node_that_is_killed_while_training(whole: RayHosts, case: Case, calm: dict[str, Any]) -> None:
    run_dir = case.directory / "training"
    with start(whole, case, "training", "run", train=TRAINING) as driver:
        lost = host_of(wait_for(run_dir, "training", 4, driver), 1)
        whole.hosts.do("kill", lost[-1])
        goes_on(driver, run_dir, lost)
    assert_trained_alike(run_dir, calm)


def test_a_node_that_is_killed_while_it_saves(whole: RayHosts, case: Case, calm: dict[str, Any]) -> None:
    run_dir, mark, code = case.directory / "saving", case.directory / "saves", case.directory / "slow"
    code.mkdir()
    (code / "sitecustomize.py").write_text(SLOW_WRITER.format(mark=str(mark)))
    path = {"PYTHONPATH": f"{code}:{ROOT}"}
    with start(whole, case, "saving", "run", train=TRAINING, variables=path) as driver:
        until = time.monotonic() + 200
        while not (mark.exists() and mark.read_text()):
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        seen, lost = events(run_dir), mark.read_text()
        rank = next(event["rank"] for event in seen if event["event"] == "worker" and event["host"] == lost)
        whole.hosts.do("kill", lost[-1])
        goes_on(driver, run_dir, lost, rank)
    assert_trained_alike(run_dir, calm)
    later = events(run_dir)[len(seen) :]
    steps = [event["done"] for event in later if event["event"] == "training"]
    assert steps[0] == 4, "it did not go on from the checkpoint before"


def refused(whole: RayHosts, case: Case, name: str, **sections: Any) -> str:
    """Run on three nodes, assert that it is refused in one message, and return that."""
    with start(whole, case, name, dp=3, **sections) as driver:
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 2, out + err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    return err.splitlines()[-1]


def test_a_model_that_one_node_lacks(whole: RayHosts, case: Case) -> None:
    for host in (1, 2, 4):
        folder = Path(whole.hosts.variables["HOSTS_DIR"], f"host{host}", "tmp", "its-model")
        shutil.copytree(case.directory / "model", folder)
    said = refused(whole, case, "lacking", model={"name_or_path": "/tmp/its-model"})
    assert said.startswith("error: model.name_or_path '/tmp/its-model' is on node1, node")
    assert "but not on node3 (rank " in said


def test_a_disk_that_is_full_on_one_node(whole: RayHosts, case: Case) -> None:
    folder = case.directory / "filled" / "progress"
    folder.mkdir(parents=True)
    _on(whole, 3, "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder)
    said = refused(whole, case, "filled")
    _on(whole, 3, "umount", folder)
    assert " on node3: cannot write " in said
    assert "No space left on device; make run_dir writable, free space" in said


def test_a_clock_that_is_an_hour_ahead_changes_nothing(whole: RayHosts, case: Case) -> None:
    folder = whole.hosts.shared / "later"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LATE_CLOCK)
    path = {"PYTHONPATH": f"{folder}:{ROOT}"}
    with start(whole, case, "ahead", dp=3, variables=path) as driver:
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    begun = {event["host"]: event["time"] for event in events(case.directory / "ahead") if event["event"] == "worker"}
    assert begun.keys() == {"node2", "node3", "node4"}
    assert begun["node4"] - begun["node2"] > 3000
    case.assert_same_scores("ahead", rtol=1e-6)


def test_a_head_that_dies_ends_the_run_and_other_hosts_go_on(whole: RayHosts, case: Case) -> None:
    run_dir = case.directory / "headless"
    with start(whole, case, "headless", "run", on=2) as driver:
        used = wait_for(run_dir, "scoring", 8, driver)
        whole.hosts.do("kill", "1")
        began = time.monotonic()
        out, err = driver.communicate(timeout=200)
        assert time.monotonic() - began < 90
    assert driver.returncode == 1, out + err
    assert f"the Ray head at {ADDRESS} has not answered for 30 s" in err, err
    assert "Traceback" not in err
    for host in (2, 3, 4):
        whole.hosts.do("kill", str(host))
    others = [host for host in (2, 3, 4) if f"node{host}" != host_of(used, 1)]
    for host in (1, *others):
        whole.hosts.do("start", str(host))
        whole.start(host)
    with start(whole, case, "headless", "run", on=others[0]) as driver:
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    written = [event for event in events(run_dir) if event.get("text") == "writing the scores"]
    assert len(written) == 1, "what ranks had computed without their head was not kept"
    case.assert_same_scores("headless", rtol=1e-6)


def _on(cluster: RayHosts, host: int, *command: str | Path) -> None:
    variables = environment(**cluster.hosts.variables)
    subprocess.run(cluster.command(host, *command), env=variables, check=True, timeout=60)
