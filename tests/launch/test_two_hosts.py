"""Ranks on two hosts that call themselves 127.0.1.1, as Debian installs them: exact, or told what a host lacks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster_case import BIN, Case, make_case
from tests.launch.hosts import Hosts, hosts


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("debian"), style="debian") as made:
        yield made


@pytest.fixture(scope="module")
def case(two: Hosts) -> Case:
    return make_case(two.shared)


def on_both(two: Hosts, config: Path, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """Run one rank on each host, as SLURM, a script or an operator would start them."""
    return two.together(
        [
            ["env", f"RANK={rank}", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=node1",
             "MASTER_PORT=29411", BIN / "plop-dist", "score", config, *overrides]
            for rank in range(2)
        ]
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_score_like_one_process_without_any_setting(two: Hosts, case: Case) -> None:
    config = case.write("both", parallel={"backend": "transformers", "zero_stage": 0}, data={"batch_size": 8})
    done = on_both(two, config)
    assert [rank.returncode for rank in done] == [0, 0], done
    case.assert_same_scores("both")


@pytest.mark.slow
def test_what_one_host_lacks_is_named_before_anything_is_loaded(two: Hosts, case: Case) -> None:
    config = case.write("apart", parallel={"backend": "transformers", "zero_stage": 0}, data={"batch_size": 8})
    done = on_both(two, config, "run_dir=/tmp/runs/apart")
    assert [rank.returncode for rank in done] == [2, 2], done
    said = done[0].stderr + done[1].stderr
    assert "run_dir '/tmp/runs/apart' on node2 (rank 1) is not the folder that node1 writes into" in said
    assert [rank.stderr.count("error:") for rank in done] == [1, 1], said

    private = Path(two.variables["HOSTS_DIR"]) / "host1" / "tmp" / "model"  # node1 sees it as /tmp/model
    shutil.copytree(case.directory / "model", private)
    done = on_both(two, config, "model.name_or_path=/tmp/model")
    assert [rank.returncode for rank in done] == [2, 2], done
    said = done[0].stderr + done[1].stderr
    assert "model.name_or_path '/tmp/model' is on node1, but not on node2 (rank 1)" in said
    assert "Traceback" not in said
