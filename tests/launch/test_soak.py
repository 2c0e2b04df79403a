"""Runs one after another on one Ray cluster leave nothing behind: neither on its nodes nor in a driver that goes on."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.cluster_case import Case, make_case, processes_with, run
from tests.launch.ray_head import Head, ray_head

pytestmark = [pytest.mark.rare, pytest.mark.timeout(7200)]
RUNS = int(os.environ.get("PLOP_DIST_SOAK_RUNS", "50"))
WARM = min(5, RUNS // 2)  # runs until caches and pools have the size that they keep
MARK = f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
SETTLES_S = 40  # Ray ends idle workers and takes back placement groups some moments later
RAYS_SOCKETS = 2  # Ray 2.60 keeps one of each ray.init() of a process: a run's, and the driver's own below

# Ray 2.60 itself keeps some of what a driver opened: as much is allowed, as it keeps of drivers that do nothing.
PLAIN_RUNS = min(15, RUNS)

# A driver that works again and again, and says after each run what it holds and what is left on the cluster.
DRIVER = f"""
import json, logging, os, sys, threading, time
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

RAYS_OWN = "AutoscalingCoordinator"  # an actor of Ray 2.60's that outlives its drivers

def left(address):
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    until = time.monotonic() + {SETTLES_S}
    while True:
        actors = [one for one in list_actors(address=address) if one.state != "DEAD" and one.name != RAYS_OWN]
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        free, there = ray.available_resources(), ray.cluster_resources()
        held = {{name: round(there[name] - free.get(name, 0)) for name in ("CPU", "memory", "object_store_memory")}}
        if not (actors or groups or any(held.values())) or time.monotonic() > until:
            break
        time.sleep(0.5)
    ray.shutdown()
    return {{"actors": len(actors), "placement groups": len(groups), **held}}

path, address, first, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for number in range(first, end):
    work(path, address, number)
    opened = [os.path.realpath(os.path.join("/proc/self/fd", name)) for name in os.listdir("/proc/self/fd")]
    sockets = sum("socket:" in name for name in opened)
    own = {{"threads": threading.active_count(), "files": len(opened) - sockets, "sockets": sockets}}
    print(json.dumps({{"own": own, "left": left(address)}}), flush=True)
"""

SCORES = """
def work(path, address, number):
    import os
    from plop_dist.config.loading import load_config
    from plop_dist.launch import pipeline
    pipeline.score(load_config(path, [f"run_dir={os.path.dirname(path)}/soak-{number}"]), "soak")
"""

# Nothing of ours: two workers of Ray Train, which do nothing.
NOTHING = """
def work(path, address, number):
    import logging, os, ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    storage = os.path.dirname(path) + f"/nothing-{number}"
    TorchTrainer(
        lambda: None, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=storage)
    ).fit()
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("soak"))


def of_cluster() -> Counter[str]:
    """Return how many processes of each kind the cluster has, and what they hold.

    Those with the head's mark alone: other programs of this machine do not matter.
    """
    found: Counter[str] = Counter()
    shared: set[str] = set()
    for pid in processes_with(MARK):
        with suppress(psutil.NoSuchProcess, OSError):  # it ends
            process = psutil.Process(pid)
            kind, threads, opened = kind_of(process), process.num_threads(), opened_by(pid)
            # Ray's log monitor keeps up to 200 logs open, of workers that have ended too.
            opened = [path for path in opened if "/logs/" not in path]
            mapped = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
            sockets = sum(path.startswith("socket:") for path in opened)
            found[kind] += 1
            found[f"{kind}: threads"] += threads
            found[f"{kind}: sockets"] += sockets
            found[f"{kind}: files"] += len(opened) - sockets
            shared.update(path for path in (*mapped, *opened) if path.startswith("/dev/shm/"))
    found["shared memory"] = len(shared)
    return found


def kind_of(process: psutil.Process) -> str:
    """Return the program that a process runs: its script, for one that Python runs."""
    scripts = (Path(part).name for part in process.cmdline() if part.endswith(".py"))
    return next(scripts, process.name())


def opened_by(pid: int) -> list[str]:
    """Return what the descriptors of a process lead to, as the kernel says it."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(path))
    return found


def at_rest() -> Counter[str]:
    """Return the least that the cluster has of each kind within a while: what it keeps while nobody uses it."""
    found, until = of_cluster(), time.monotonic() + SETTLES_S
    while time.monotonic() < until:
        time.sleep(0.5)
        found &= of_cluster()
    return found


def driven(config: Path, head: Head, work: str, numbers: range) -> list[dict[str, Any]]:
    """Do the work of these numbers in one driver; return what it held and what was left after each."""
    program = work + DRIVER
    done = run(
        sys.executable, "-c", program, config, head.address, str(numbers.start), str(numbers.stop), timeout_s=7200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def grown(config: Path, head: Head, work: str, runs: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return what the drivers held after each run, and how much more of each kind the cluster keeps per warm run."""
    warm_up = driven(config, head, work, range(WARM))
    warm = at_rest()
    driver = driven(config, head, work, range(WARM, WARM + runs))
    last = at_rest()
    print(*warm_up, *driver, *((name, warm[name], last[name]) for name in sorted(warm | last)), sep="\n")
    assert [one["left"] for one in (*warm_up, *driver) if any(one["left"].values())] == []
    return driver, {name: (last[name] - warm[name]) / runs for name in warm | last}


def test_nothing_grows_with_the_number_of_runs(case: Case) -> None:
    kept: dict[str, dict[str, float]] = {}
    drivers: dict[str, list[dict[str, Any]]] = {}
    for name, work, runs in (("nothing", NOTHING, PLAIN_RUNS), ("scores", SCORES, RUNS - WARM)):
        marked: Any = {MARK: "1"}
        with ray_head("--object-store-memory=100000000", **marked) as head:
            config = case.write(
                "soak", parallel={"backend": "transformers", "zero_stage": 0}, cluster={"address": head.address}
            )
            drivers[name], kept[name] = grown(config, head, work, runs)
    case.assert_same_scores(f"soak-{RUNS - 1}")
    # What grew with each run would be more by at least one a run; pools and caches vary by a few.
    allowed = (RUNS - WARM) // 5
    own = [one["own"] for one in drivers["scores"][WARM:] or drivers["scores"][-1:]]
    rightly = {"threads": 0, "files": 0, "sockets": RAYS_SOCKETS * (len(own) - 1)}
    more = {name: own[-1][name] - own[0][name] - rightly[name] for name in rightly}
    assert {name: count for name, count in more.items() if count > allowed} == {}, own
    over = {}
    for name, per_run in kept["scores"].items():
        of_ray = max(0.0, kept["nothing"].get(name, 0.0))
        count = round((per_run - of_ray) * (RUNS - WARM), 1) - (allowed if ": " in name else 0)
        if count > 0:
            over[name] = count
    assert over == {}, kept
