"""One small problem for everything that starts ranks: model, rows, configuration, and the scores of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from plop_dist.launch.rank import run_rank
from plop_dist.values.scores import Scores
from tests.models import save_tiny

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Case:
    """A directory with the model, the rows, and the scores that one process computes."""

    directory: Path
    scores: Scores

    def tree(self, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration for two ZeRO-3 ranks in run directory `name`."""
        base: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(self.directory / "model"), "dtype": "float32"},
            "data": {"path": str(self.directory / "rows.jsonl"), "template": "{question} {answer}", "batch_size": 1,
                     "num_samples": 96, "max_length": 32},
            "parallel": {"backend": "deepspeed", "dp": 2, "zero_stage": 3},
            "placement": {"rank": 4, "alpha": 8},
            "cluster": {"timeout_s": 60},
        }  # fmt: skip
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}
        return {"run_dir": str(self.directory / name), **merged}

    def write(self, name: str, **sections: dict[str, Any]) -> Path:
        """Write that configuration as YAML and return its path."""
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.tree(name, **sections)))
        return path

    def assert_same_scores(self, name: str, rtol: float = 1e-5) -> None:
        """Assert that the run's gains, baselines and NFNs are those of one process."""
        found = Scores.from_file(self.directory / name / "scores.json")
        assert [module.fqn for module in found.modules] == [module.fqn for module in self.scores.modules]
        for field in ("num_tokens", "gain", "baseline", "nfn"):
            got, expected = (np.array([getattr(m, field) for m in s.modules]) for s in (found, self.scores))
            np.testing.assert_allclose(got, expected, rtol=rtol, err_msg=field)


def make_case(directory: Path) -> Case:
    """Write model and rows, and score them in this process."""
    from plop_dist.config.loading import parse_config
    from plop_dist.rundir.stages import Stages

    save_tiny("llama", directory / "model")
    rows = [{"question": f"add {a} and {a * 7 % 23}", "answer": f"is {a + a * 7 % 23}"} for a in range(200)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_rank = {"backend": "transformers", "dp": 1, "zero_stage": 0}
    config = parse_config(Case(directory, None).tree("one", parallel=one_rank, data={"batch_size": 16}))  # type: ignore[arg-type]
    stages = Stages(config)
    stages.run_dir.prepare()
    run_rank(stages, ["score"], lambda kind, **fields: None)
    return Case(directory, Scores.from_file(directory / "one" / "scores.json"))


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of events.jsonl so far."""
    path = run_dir / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of commands: the virtual environment's programs, one thread, no waiting for a hub."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # Without SPT_NOENV, Ray's processes write their titles over what the kernel shows of their environment.
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SPT_NOENV": "1", **more}


def run(*command: str | Path, timeout_s: float = 330, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's root with captured output; nothing that it started outlives a timeout."""
    with session([str(part) for part in command], environment(**more)) as process:
        out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def session(
    command: list[str], variables: dict[str, str], output: IO[str] | int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """Start a command as the leader of its own process group; afterwards end it, and what is left of the group."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=output, stderr=output, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # not the group: launchers and Ray end their children in order
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_with(mark: str) -> list[int]:
    """Return the ids of living processes whose environment holds `mark`: what a command left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark.encode() in (path / "environ").read_bytes()
        except OSError:
            continue  # ended meanwhile, or another user's
        if is_marked:
            found.append(int(path.name))
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at this moment, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
