"""Two hosts of SLURM: srun makes one job of its tasks, and the batch script that is shipped scores."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.cluster_case import BIN, ROOT, Case, make_case
from tests.launch.hosts import Hosts, hosts
from tests.launch.slurm import slurm

pytestmark = pytest.mark.rare
PLAIN = {"backend": "transformers", "zero_stage": 0}
STEPS = 100_000
ENDLESS = {"method": "sft", "max_steps": STEPS, "save_steps": STEPS, "eval_samples": 2, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("slurm"), style="debian") as made:
        yield made


@pytest.fixture(scope="module")
def case(two: Hosts) -> Case:
    return make_case(two.shared)


@pytest.fixture(scope="module")
def variables(two: Hosts, case: Case) -> Iterator[dict[str, str]]:
    with slurm(two, 2) as found:
        yield {**found, "PYTHONPATH": str(ROOT)}


def do(two: Hosts, variables: dict[str, str], *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's on host 1."""
    return subprocess.run(
        two.command(1, *map(str, command)), env=variables, cwd=two.shared, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


def test_srun_makes_one_job_of_two_tasks(two: Hosts, case: Case, variables: dict[str, str]) -> None:
    config = case.write("srun", parallel=PLAIN, data={"batch_size": 8})
    done = do(two, variables, "srun", "-N2", "-n2", BIN / "plop-dist", "run", config)
    assert done.returncode == 0, done.stdout + done.stderr
    case.assert_same_scores("srun")
    assert done.stdout.count("NFN per module type") == 1, "the job ran twice"


@pytest.mark.parametrize("way", ["srun", "torchrun", "ray"])
def test_the_batch_script_scores(two: Hosts, case: Case, variables: dict[str, str], way: str) -> None:
    config = case.write(f"batch-{way}", parallel=PLAIN, data={"batch_size": 8})
    script = ROOT / "launchers" / "slurm.sbatch"
    given = {**variables, "PLOP_DIST_LAUNCH": way}
    output = two.shared / f"batch-{way}.log"
    wanted = ["--wait", "--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    done = do(two, given, "sbatch", *wanted, script, config)
    assert done.returncode == 0, done.stderr + (output.read_text() if output.exists() else "")
    case.assert_same_scores(f"batch-{way}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["srun", "torchrun", "ray"])
def test_a_job_whose_time_is_nearly_over_leaves_a_checkpoint(
    two: Hosts, case: Case, variables: dict[str, str], way: str
) -> None:
    """The signal of the script's --signal is sent by hand, to where SLURM sends it."""
    name = f"ended-{way}"
    config = case.write(name, parallel=PLAIN, data={"batch_size": 8}, train=ENDLESS)
    output, log = two.shared / f"{name}.log", case.directory / name / "train" / "log.jsonl"
    wanted = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    given = {**variables, "PLOP_DIST_LAUNCH": way}
    job = do(two, given, "sbatch", *wanted, ROOT / "launchers" / "slurm.sbatch", config).stdout.strip()
    until(lambda: log.is_file() and log.read_text().count("\n") > 1, output, 240)
    do(two, variables, "scancel", "--batch", "--signal=TERM", job)
    until(lambda: not do(two, variables, "squeue", "--noheader", f"--jobs={job}").stdout.strip(), output, 90)
    stopped = re.search(rf"training stopped after step (\d+) of {STEPS}, with a checkpoint", output.read_text())
    assert stopped, output.read_text()
    if way != "torchrun":  # which ends in a traceback of its own at a signal
        assert "Traceback" not in output.read_text()


def until(is_so: Callable[[], bool], output: Path, timeout_s: float) -> None:
    """Wait until something is so; what the job has said is in the error."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, output.read_text() if output.exists() else "the job has said nothing"
        time.sleep(0.2)
