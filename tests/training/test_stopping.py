"""A training that is stopped by a signal leaves a checkpoint of the step that it was in, and goes on from there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.cases import write_case
from tests.models import save_tiny

ROOT = Path(__file__).parents[2]
STEPS = 100_000
TRAIN = {"method": "sft", "max_steps": STEPS, "save_steps": STEPS, "eval_samples": 2, "micro_batch_size": 1}


def run_until_a_step(config: Path, number: int, *overrides: str) -> tuple[int, str]:
    """Start `plop-dist run`, send a signal once it has trained two steps more, and return exit status and stderr."""
    command = [sys.executable, "-m", "plop_dist.cli", "run", str(config), *overrides]
    log = config.parent / "run" / "train" / "log.jsonl"
    before = len(log.read_text().splitlines()) if log.is_file() else 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        until = time.monotonic() + 300
        while started.poll() is None and time.monotonic() < until:
            if log.is_file() and len(log.read_text().splitlines()) >= before + 2:
                break
            time.sleep(0.1)
        started.send_signal(number)
        _, err = started.communicate(timeout=120)
        return started.returncode, err


def stopped_at(err: str) -> int:
    """Return the step after which the training says that it has stopped."""
    found = re.search(rf"training stopped after step (\d+) of {STEPS}, with a checkpoint", err)
    assert found, err
    return int(found[1])


def last_step(config: Path) -> int:
    lines = (config.parent / "run" / "train" / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"]


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_from_which_the_next_run_goes_on(tmp_path: Path) -> None:
    config = write_case(tmp_path, save_tiny("llama", tmp_path / "model"), train=TRAIN)
    status, err = run_until_a_step(config, signal.SIGINT)
    assert status == 130, err
    assert "Traceback" not in err
    assert "interrupted; the same command goes on" in err
    first = stopped_at(err)
    assert first == last_step(config)
    status, err = run_until_a_step(config, signal.SIGTERM)
    assert status == 143, err
    assert f"training goes on from step {first} of {STEPS}" in err
    assert stopped_at(err) > first


@pytest.mark.rare
@pytest.mark.parametrize("way", ["parallel.tp=2", "parallel.dp=2"])
def test_workers_of_ray_leave_a_checkpoint_too(tmp_path: Path, way: str) -> None:
    """The driver has the signal; at tp the step loop is our own, at dp TRL's."""
    config = write_case(tmp_path, save_tiny("llama", tmp_path / "model"), train=TRAIN)
    status, err = run_until_a_step(config, signal.SIGINT, way)
    assert status == 130, err
    first = stopped_at(err)
    status, err = run_until_a_step(config, signal.SIGINT, way)
    assert status == 130, err
    assert f"training goes on from step {first} of {STEPS}" in err
