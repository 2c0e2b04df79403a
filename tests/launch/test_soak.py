"""Runs one after another on one Ray cluster leave nothing behind: neither on its nodes nor in a driver that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.cluster_case import Case, environment, make_case, processes_with, session
from tests.launch.ray_head import Head, ray_head

pytestmark = [pytest.mark.rare, pytest.mark.timeout(7200)]
RUNS = int(os.environ.get("PLOP_DIST_SOAK_RUNS", "50"))
WARM = 5  # runs until caches and pools have the size that they keep
MARK = f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
SETTLES_S = 40  # Ray ends idle workers and takes back placement groups some moments later

# A driver that scores again and again; after each run it says what it holds and what Ray does, and waits for a line.
DRIVER = """
import json, logging, os, sys, threading, time
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
from plop_dist.config.loading import load_config
from plop_dist.launch import pipeline

RAYS_OWN = "AutoscalingCoordinator"  # an actor of Ray 2.60's that outlives its drivers

def held(address):
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    until = time.monotonic() + 40
    while True:
        actors = [one for one in list_actors(address=address) if one.state != "DEAD" and one.name != RAYS_OWN]
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        free, there = ray.available_resources(), ray.cluster_resources()
        counted = {name: round(there[name] - free.get(name, 0)) for name in ("CPU", "memory", "object_store_memory")}
        if not (actors or groups or any(counted.values())) or time.monotonic() > until:
            break
        time.sleep(0.5)
    ray.shutdown()
    return {"actors": len(actors), "placement_groups": len(groups), **counted}

path, address, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.dup2(os.open(path + ".log", os.O_WRONLY | os.O_CREAT), 2)  # a pipe that nobody reads would fill
for number in range(runs):
    pipeline.score(load_config(path, [f"run_dir={os.path.dirname(path)}/soak-{number}"]), "soak")
    opened = [os.path.realpath(os.path.join("/proc/self/fd", name)) for name in os.listdir("/proc/self/fd")]
    sockets = sum("socket:" in name for name in opened)
    found = {"threads": threading.active_count(), "files": len(opened) - sockets, "sockets": sockets, **held(address)}
    print(json.dumps(found), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("--object-store-memory=100000000", **{MARK: "1"}) as running:
        yield running


def of_cluster() -> dict[str, int]:
    """Return how many processes, threads, open files and pieces of shared memory the cluster has."""
    found: Counter[str] = Counter()
    for pid in processes_with(MARK):
        try:
            process = psutil.Process(pid)
            # Ray's log monitor keeps up to 200 logs open, of workers that have ended too.
            num_files = 0 if "log_monitor.py" in " ".join(process.cmdline()) else process.num_fds()
            found.update({"processes": 1, "threads": process.num_threads(), "files": num_files})
        except psutil.NoSuchProcess:
            continue
    return {**found, "shared memory": len(list(Path("/dev/shm").iterdir()))}


def settled(most: dict[str, int] | None) -> dict[str, int]:
    """Return what the cluster has once it is no more than `most`, or after a while."""
    until = time.monotonic() + SETTLES_S
    while True:
        found = of_cluster()
        if time.monotonic() > until or (most is not None and all(found[name] <= most[name] for name in most)):
            return found
        time.sleep(0.5)


def test_nothing_grows_with_the_number_of_runs(case: Case, head: Head) -> None:
    config = case.write(
        "soak", parallel={"backend": "transformers", "zero_stage": 0}, cluster={"address": head.address}
    )
    driver: list[dict[str, Any]] = []
    with session(
        [sys.executable, "-c", DRIVER, str(config), head.address, str(RUNS)], environment(), stdin=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        warm: dict[str, int] = {}
        for number in range(RUNS):
            line = process.stdout.readline()
            assert line, Path(f"{config}.log").read_text()[-3000:]
            driver.append(json.loads(line))
            if number == min(WARM, RUNS - 1):
                warm = settled(None)
            print(number, driver[-1], warm)
            process.stdin.write("\n")
            process.stdin.flush()
        process.communicate(timeout=60)
    last = settled(warm)  # without the sockets of Ray's own that a driver keeps until it ends, and what serves them
    print(last)
    case.assert_same_scores(f"soak-{RUNS - 1}")
    own = ("threads", "files", "sockets")
    assert all(not held[name] for held in driver for name in held if name not in own), driver
    # What grew with each run would be more by at least one a run.
    allowed = (RUNS - WARM) // 5
    for name in ("threads", "files"):
        assert driver[-1][name] <= driver[min(WARM, RUNS - 1)][name] + allowed, [one[name] for one in driver]
    # Ray 2.60 keeps a socket of each ray.init() of a process; a run joins once, and so do we to ask what is left.
    assert driver[-1]["sockets"] <= driver[0]["sockets"] + 2 * RUNS, [one["sockets"] for one in driver]
    assert {name: count for name, count in last.items() if count > warm[name] + allowed} == {}, (warm, last)
