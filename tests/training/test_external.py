"""A GRPO engine of its own, once installed, is started as a Ray job by `run`; a simulated verl stands in for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import payloads
from tests.launch.cluster_case import BIN, run
from tests.models import save_tiny

# What the launch script starts: prints its arguments, then fails as often as it is told to.
SIMULATED_VERL = """
import os, sys
from pathlib import Path
print("simulated verl", *sys.argv[1:], "in", os.getcwd(), "with Ray at", os.environ.get("RAY_ADDRESS"))
mark = Path(__file__).with_name("failed")
if not mark.exists():
    mark.touch()
    sys.exit(7)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 32},
        "placement": {"k": 2, "rank": 4, "alpha": 8},
        "train": {"method": "grpo", "engine": "verl", "answer_field": "number", "micro_batch_size": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_with(packages: Path, config: Path) -> subprocess.CompletedProcess[str]:
    return run(BIN / "plop-dist", "run", config, PYTHONPATH=f"{packages}:{Path(__file__).parents[2]}")


@pytest.mark.slow
def test_an_installed_engine_is_started_and_its_exit_status_is_that_of_the_run(tmp_path: Path, config: Path) -> None:
    packages = tmp_path / "packages"
    trainer = packages / "verl" / "trainer"
    trainer.mkdir(parents=True)
    for directory in (trainer.parent, trainer):
        (directory / "__init__.py").touch()
    (trainer / "main_ppo.py").write_text(SIMULATED_VERL)
    train = tmp_path / "run" / "train"

    failed = run_with(packages, config)
    assert failed.returncode == 7, failed.stdout + failed.stderr
    assert "simulated verl" in failed.stdout
    assert "Traceback" not in failed.stderr
    assert f"{train / 'verl' / 'launch.sh'} ended with status 7" in failed.stderr.splitlines()[-1]
    assert not (train / "job.json").exists()

    again = run_with(packages, config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "train/job.json is missing" in again.stderr
    job = json.loads((train / "job.json").read_text())
    assert job["exit_status"] == 0
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("simulated verl")]
    assert f"actor_rollout_ref.model.path={tmp_path / 'model'}" in line.replace("'", "").replace('"', "")
    assert f"in {job['directory']} with Ray at " in line
    assert not line.endswith("None"), "the job was not told of the Ray that it runs in"

    kept = run_with(packages, config)
    assert kept.returncode == 0, kept.stderr
    assert "simulated verl" not in kept.stdout, "what has succeeded ran again"

    # What somebody else has written there is neither run nor gone on from.
    marker = tmp_path / "marker"
    (tmp_path / "theirs.sh").write_text(f"mkdir {marker}\n")
    summary = json.loads((train / "summary.json").read_text())
    job = {"script": str(tmp_path / "theirs.sh"), "directory": job["directory"]}
    (train / "summary.json").write_text(json.dumps({**summary, "job": job}))
    shutil.rmtree(tmp_path / "run" / "exports")
    exported = run_with(packages, config)
    assert exported.returncode == 0, exported.stderr
    assert not marker.exists()
    assert payloads.fires(marker, lambda: subprocess.run(["sh", job["script"]], check=True))
    payloads.torch_file(train / "verl" / "checkpoints" / "global_step_1" / "data.pt", marker)
    (train / "job.json").unlink()
    refused = run_with(packages, config)
    assert refused.returncode == 2, refused.stderr
    assert "holds checkpoints of an earlier job, from which verl would go on" in refused.stderr.splitlines()[-1]
    assert not marker.exists()
