"""The launch scripts start real ranks: the DeepSpeed launcher and torchrun with two slots on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch.cluster_case import ROOT, Case, free_ports, make_case, run


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("launchers"))


@pytest.mark.slow
def test_deepspeed_launcher_with_a_hostfile_of_two_local_slots(case: Case) -> None:
    hostfile = case.directory / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    options = f"--no_ssh --node_rank 0 --master_addr 127.0.0.1 --master_port {free_ports(1)[0]}"
    script = ROOT / "launchers" / "deepspeed_hostfile.sh"
    done = run(script, hostfile, case.write("hostfile-run"), "data.batch_size=16", DEEPSPEED_OPTIONS=options)
    assert done.returncode == 0, done.stderr
    case.assert_same_scores("hostfile-run")
    assert done.stdout.count("NFN per module type") == 1, "every rank printed the table"


@pytest.mark.slow
def test_torchrun_with_two_ranks(case: Case) -> None:
    variables = {"PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": str(free_ports(1)[0])}
    script = ROOT / "launchers" / "torchrun.sh"
    done = run(script, case.write("torchrun"), "data.batch_size=16", "parallel.zero_stage=2", **variables)
    assert done.returncode == 0, done.stderr
    case.assert_same_scores("torchrun")
    assert done.stdout.startswith("NFN per module type"), done.stdout


@pytest.mark.slow
def test_what_all_ranks_have_to_say_is_said_once_and_only_ours_is_on_stdout(case: Case) -> None:
    variables = {"PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": str(free_ports(1)[0])}
    script = ROOT / "launchers" / "torchrun.sh"
    for override in ("data.path=nowhere.jsonl", "placement.k=99"):  # found by each rank, and by rank 0 alone
        done = run(script, case.write("once"), "parallel.zero_stage=2", override, **variables)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("error: ") == 1, done.stderr


def test_scripts_can_be_executed_and_explain_their_use() -> None:
    scripts = sorted((ROOT / "launchers").glob("*.sh"))
    assert [script.stem for script in scripts] == ["deepspeed_hostfile", "ray_job_submit", "torchrun"]
    for script in scripts:
        assert os.access(script, os.X_OK), script
        assert f"launchers/{script.name}" in script.read_text()


def test_the_image_is_pinned_installs_like_make_setup_and_runs_without_rights() -> None:
    lines = Path(ROOT, "docker", "Dockerfile").read_text().splitlines()
    tag = next(line for line in lines if line.startswith("FROM ")).split(":")[1]
    assert tag.count(".") >= 2, f"python:{tag} is not one release"
    install = next(i for i, line in enumerate(lines) if line.startswith("RUN make setup"))
    assert lines.index("USER plop") < install, "the installation runs as root"
    assert not any("pip install" in line for line in lines), "a second list of packages"
