"""A vLLM server that the run starts with another Python, for which a simulated one stands in: key, end, refusals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.training.samplers.own_server import OwnServer
from plop_dist.training.train import check_trainable
from tests.models import save_tiny, tiny
from tests.training.cases import make_placement
from tests.training.grpo.cases import make_config, run_grpo

ROOT = Path(__file__).parents[3]
STAND_IN = "from tests.training.grpo.vllm_stand_in import main\nmain(sys.argv[1:])\n"
SILENT = "import time\ntime.sleep(600)\n"
BROKEN = "raise ValueError('no room for the cache')\n"


def python_with_vllm(directory: Path, code: str) -> Path:
    """Return a Python that has a package vllm, whose command notes process id and arguments and runs the code."""
    package = directory / "site" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    note = f"import os, sys; open({str(directory / 'noted')!r}, 'w').write(' '.join([str(os.getpid()), *sys.argv[1:]]))"
    (package / "main.py").write_text(f"{note}\n{code}")
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={directory / "site"}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def configured(directory: Path, python: Path, *, timeout_s: float = 60, **train: Any) -> Config:
    keys = {"sampler": "vllm", "engine_python": str(python), "vllm": {"timeout_s": timeout_s}}
    return make_config(directory, "run", train={**keys, **train})


def ended(process: int, seconds: float = 30) -> bool:
    """Tell whether a process is gone, or is within so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def noted(directory: Path) -> list[str]:
    return (directory / "noted").read_text().split()


@pytest.mark.slow
def test_a_run_starts_a_server_for_its_adapters_and_ends_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    train = {"max_steps": 2, "gradient_accumulation_steps": 1, "max_completion_length": 4, "temperature": 0.8,
             "sampler": "vllm", "engine_python": str(python_with_vllm(tmp_path, STAND_IN))}  # fmt: skip
    found = run_grpo(tmp_path, "run", sampler="vllm", train={**train, "vllm": {"timeout_s": 60, "max_model_len": 64}})
    assert [entry["step"] for entry in found["entries"]] == [1, 2]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in found["entries"])
    process, *arguments = noted(tmp_path)
    options = dict(pairwise(arguments))
    assert (options["--dtype"], options["--max-lora-rank"], options["--max-model-len"]) == ("float32", "8", "64")
    assert options["--host"] == "127.0.0.1"
    assert ended(int(process))
    assert not (tmp_path / "run" / "train" / "vllm").exists()


@pytest.mark.slow
def test_a_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    config = configured(tmp_path, python_with_vllm(tmp_path, SILENT), timeout_s=300)
    config.run_path.joinpath("train").mkdir(parents=True)
    script = (
        "import sys; from plop_dist.config.schema import Config; "
        "from plop_dist.training.samplers.own_server import OwnServer; "
        "OwnServer(Config.model_validate_json(sys.argv[1]), 4)"
    )
    run = subprocess.Popen([sys.executable, "-c", script, config.model_dump_json()], cwd=ROOT)
    end = time.monotonic() + 60
    while not (tmp_path / "noted").exists() or not (tmp_path / "noted").read_text():
        assert time.monotonic() < end
        assert run.poll() is None
        time.sleep(0.1)
    process = int(noted(tmp_path)[0])
    assert not ended(process, 0.5)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert ended(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "timeout_s", "message"),
    [
        (BROKEN, 60, r"ended with status 1 \(ValueError: no room for the cache\); what it said is in .*vllm\.log"),
        (SILENT, 3, r"has not answered within train\.vllm\.timeout_s \(3 s\)"),
    ],
    ids=["broken", "silent"],
)
def test_a_server_that_does_not_come_up_is_named_and_ended(
    tmp_path: Path, code: str, timeout_s: float, message: str
) -> None:
    config = configured(tmp_path, python_with_vllm(tmp_path, code), timeout_s=timeout_s)
    config.run_path.joinpath("train").mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        OwnServer(config, 4)
    assert ended(int(noted(tmp_path)[0]))


def test_what_cannot_serve_the_trained_weights_is_refused_by_name(tmp_path: Path) -> None:
    config = configured(tmp_path, Path(sys.executable))
    with pytest.raises(ConfigError, match=re.escape(f"{sys.executable} (Python") + ".* has no vllm; name the Python"):
        check_trainable(config)
    stored = config.model.model_copy(update={"checkpoint": "iter_0000001"})
    with pytest.raises(ConfigError, match=r"model\.checkpoint is given and train\.vllm\.url is not"):
        check_trainable(config.model_copy(update={"model": stored}))
    with pytest.raises(ConfigError, match=r"train\.vllm\.mode is colocate, which is TRL's"):
        check_trainable(configured(tmp_path, Path(sys.executable), vllm={"mode": "colocate"}))
    with pytest.raises(ConfigError, match=r"placement\.rank: 600 is above 512"):
        OwnServer(configured(tmp_path, python_with_vllm(tmp_path, SILENT)), 600)
