"""A cluster installed otherwise than the driver: another python first on its PATH, GPUs that torch cannot use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.launch.cluster_case import BIN, Case, events, make_case, run
from tests.launch.ray_head import Head, ray_head

pytestmark = pytest.mark.slow
PLAIN = {"backend": "transformers", "zero_stage": 0}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("other")
    (folder / "python").write_text("#!/bin/sh\necho no module named plop_dist >&2\nexit 1\n")
    (folder / "python").chmod(0o755)
    with ray_head("--num-gpus=2", PATH=f"{folder}{os.pathsep}{os.environ['PATH']}") as running:
        yield running


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("heads"))


def test_no_gpu_is_asked_for_where_none_is_wanted(case: Case, head: Head) -> None:
    cluster = {"address": head.address, "gpus_per_worker": 0, "start_timeout_s": 60}
    done = run(BIN / "plop-dist", "score", case.write("cpus", parallel=PLAIN, cluster=cluster))
    assert done.returncode == 0, done.stderr
    case.assert_same_scores("cpus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use GPUs here")
def test_gpus_that_torch_cannot_use_are_told_with_a_remedy(case: Case, head: Head) -> None:
    cluster = {"address": head.address, "start_timeout_s": 60, "max_failures": 1}
    done = run(BIN / "plop-dist", "score", case.write("gpus", parallel=PLAIN, cluster=cluster))
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert "cluster.gpus_per_worker" in said
    assert "Traceback" not in done.stderr
    assert {event["attempt"] for event in events(case.directory / "gpus") if event["event"] == "worker"} <= {1}


def test_a_job_runs_in_the_interpreter_of_its_ray(case: Case, head: Head) -> None:
    alone = {"parallel": {**PLAIN, "dp": 1}, "data": {"batch_size": 16}}
    config = case.write("job", **alone)
    done = run(BIN / "plop-dist", "submit", config, "--address", head.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    case.assert_same_scores("job")
