"""Submits Ray jobs, `plop-dist run` itself or the script of a training engine of its own, and follows their logs."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, WorkerError, first_line
from plop_dist.launch.cluster import close_token, connected, with_absolute_paths
from plop_dist.values.visible import log_text, say


def submit_job(config: Config, address: str) -> int:
    """Run `plop-dist run` with this configuration as a Ray job and follow its log; returns the job's exit status.

    Paths in the configuration are those of the cluster's nodes. The job uses the `python` on the head node's PATH:
    start Ray there in the environment that has plop-dist. Raises ConfigError when the address does not take jobs.
    """
    whole = with_absolute_paths(config)
    whole = whole.model_copy(update={"cluster": whole.cluster.model_copy(update={"address": "auto"})})
    # References stay: the nodes have their own environment, and a job's description is for all to read.
    references = {key: text for key, text in whole.references.items() if key != "cluster.address"}
    close_token()
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.yaml").write_text(whole.with_references(references).stored_yaml())
            job = client.submit_job(
                entrypoint="python -m plop_dist.cli run config.yaml", runtime_env={"working_dir": directory}
            )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address {address} does not take this job: {first_line(error)}; give the URL of the Ray dashboard, and "
            "RAY_AUTH_TOKEN where the cluster asks for one."
        ) from error
    return _follow_job(client, job)


def run_script(config: Config, script: Path, directory: Path) -> int:
    """Run a shell script as a Ray job, from `directory`, and follow its log; returns its exit status.

    On the configured cluster, else on a local Ray that ends with it. Raises ConfigError, WorkerError.
    """
    with connected(config, takes_jobs=True):
        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        variables = {}
        if address is None:
            # The script's python is this one, and finds what lies in the current directory, as this one does.
            path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            packages = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
            variables = {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(filter(None, packages))}
        try:
            client = JobSubmissionClient(address or ray.get_runtime_context().gcs_address)
            job = client.submit_job(
                entrypoint=f"cd {shlex.quote(str(directory))} && exec sh {shlex.quote(str(script))}",
                runtime_env={"env_vars": variables},
            )
        except (RayError, OSError, RuntimeError, ValueError) as error:
            raise WorkerError(
                f"{script} could not be submitted as a Ray job: {first_line(error)}; cluster.address must be of a Ray "
                "with its dashboard, or run the script yourself."
            ) from error
        return _follow_job(client, job)


def _follow_job(client: Any, job: str) -> int:
    """Print a job's log until it ends; returns its exit status, at least 1 if it failed."""

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            say(log_text(lines), end="", at_once=True)

    asyncio.run(follow())
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if status is JobStatus.SUCCEEDED:
        return 0
    return client.get_job_info(job).driver_exit_code or 1
