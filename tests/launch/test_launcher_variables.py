"""Processes that srun, mpirun or another MPI has started are the ranks of one job."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist import ranks
from plop_dist.errors import LayoutError
from plop_dist.launch.launcher import adopt_launcher, expanded
from tests.launch.cluster_case import BIN, Case, environment, make_case

SRUN = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-1",
}  # fmt: skip
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SRUN, ("5", "8", "1", "gpu03")),
        (MPIRUN, ("3", "4", "3", "127.0.0.1")),
        (HYDRA, ("0", "2", "0", "127.0.0.1")),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "head"}, ("3", "4", "3", "head")),
    ],
)
def test_their_variables_are_said_as_torchs(given: dict[str, str], expected: tuple[str, ...]) -> None:
    found = dict(given)
    assert adopt_launcher(found) in ("srun", "mpirun", "mpiexec")
    assert tuple(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")) == expected
    assert 20000 <= int(found["MASTER_PORT"]) < 30000
    other = {name: value for name, value in given.items() if name not in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")}
    if given is SRUN:
        same = {**other, "SLURM_PROCID": "0"}
        adopt_launcher(same)
        assert (same["MASTER_ADDR"], same["MASTER_PORT"]) == (found["MASTER_ADDR"], found["MASTER_PORT"])


@pytest.mark.parametrize(
    "given",
    [
        {**SRUN, "RANK": "1", "WORLD_SIZE": "2"},  # torchrun under srun, on each node
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"},  # the body of a batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {},
    ],
)
def test_what_started_no_ranks_changes_nothing(given: dict[str, str]) -> None:
    found = dict(given)
    assert adopt_launcher(found) is None
    assert found == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID is 8 and SLURM_STEP_NUM_TASKS is 8"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many', expected a number"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun started 4 ranks on several hosts .* MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        adopt_launcher(dict(given))


def test_lists_of_hosts() -> None:
    assert list(expanded("a")) == ["a"]
    assert list(expanded("r[1-2]n[09-10],b-1.x")) == ["r1n09", "r1n10", "r2n09", "r2n10", "b-1.x"]
    assert list(expanded("")) == []


@pytest.mark.parametrize(("local_rank", "count", "expected"), [("3", 8, 3), ("3", 1, 0), ("0", 1, 0), ("4", 4, None)])
def test_the_device_is_the_local_ranks(
    local_rank: str, count: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if expected is None:
        with pytest.raises(LayoutError, match=r"number 4 on its host .* shows it 4 GPUs"):
            ranks.local_device()
    else:
        assert ranks.local_device() == expected


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("variables"))


@pytest.mark.slow
def test_two_tasks_of_a_step_are_one_job(case: Case) -> None:
    config = case.write("step")
    step: dict[str, Any] = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step["SLURM_JOB_ID"] = f"{os.getpid()}{time.time_ns()}"
    command = [str(BIN / "plop-dist"), "run", str(config), "data.batch_size=16"]
    tasks = [
        subprocess.Popen(
            command, env=environment(**{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    case.assert_same_scores("step")
    assert sum(out.count("NFN per module type") for out, _ in said) == 1, "each task ran a job of its own"
    assert Path(case.directory / "step" / "scores.json").is_file()
