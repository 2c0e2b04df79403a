"""Two hosts of SLURM: srun makes one job of its tasks, and the batch script that is shipped scores."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.launch.cluster_case import BIN, ROOT, Case, make_case
from tests.launch.hosts import Hosts, hosts
from tests.launch.slurm import slurm

pytestmark = pytest.mark.rare
PLAIN = {"backend": "transformers", "zero_stage": 0}


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
