"""A cluster that starts its nodes when ranks ask for them: waited for, with none at the beginning, and said."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.launch.cluster_case import BIN, Case, free_ports, make_case, processes_with, run
from tests.launch.ray_head import Head, ray_head

pytestmark = pytest.mark.slow
PLAIN = {"backend": "transformers", "zero_stage": 0}


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head without a CPU, with Ray's own autoscaler, whose nodes are processes here: two of 2 CPUs at most."""
    (port,) = free_ports(1)
    tree = {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 1, "upscaling_speed": 1.0,
        "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                     "disable_launch_config_check": True, "gcs_address": f"127.0.0.1:{port}"},
        "auth": {"ssh_user": "nobody"}, "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 2, "object_store_memory": 100_000_000}, "node_config": {},
                      "min_workers": 0, "max_workers": 2},
        },
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {}, "docker": {},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("fake") / "autoscaler.json"
    path.write_text(json.dumps(tree))
    mark = f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
    with ray_head(
        f"--autoscaling-config={path}", "--object-store-memory=100000000", num_cpus=0, port=port,
        RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1", **{mark: "1"},
    ) as head:  # fmt: skip
        yield head
    for pid in processes_with(mark):  # of nodes that the head has started
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("growing"))


def test_nodes_are_asked_for_and_waited_for(case: Case, growing: Head) -> None:
    wanted = {"address": growing.address, "cpus_per_worker": 2, "start_timeout_s": 150}
    done = run(BIN / "plop-dist", "score", case.write("grown", parallel=PLAIN, cluster=wanted))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"2 workers need 2 CPUs each .*; the cluster is asked to start nodes; waiting up to", done.stderr)
    case.assert_same_scores("grown")


def test_what_no_node_can_have_is_waited_for_in_the_stated_time(case: Case, growing: Head) -> None:
    wanted = {"address": growing.address, "cpus_per_worker": 64, "start_timeout_s": 8}
    began = time.monotonic()
    done = run(BIN / "plop-dist", "score", case.write("huge", parallel=PLAIN, cluster=wanted), timeout_s=100)
    assert time.monotonic() - began < 60
    assert done.returncode == 1, done.stderr
    assert "waited for cluster.start_timeout_s (8 s)" in done.stderr.splitlines()[-1]
