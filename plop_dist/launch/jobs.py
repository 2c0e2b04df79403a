"""Submits Ray jobs, `plop-dist run` itself or the script of a training engine of its own, and follows their logs."""

from __future__ import annotations

import asyncio
import http.client
import os
import shlex
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, PlopError, WorkerError, first_line
from plop_dist.launch.asked import Asked, head_address
from plop_dist.launch.cluster import address_of, close_token, connected
from plop_dist.launch.same_files import with_absolute_paths
from plop_dist.values.visible import log_text, say

_CONFIG, _START = "plop-dist-config.yaml", "plop-dist-start.sh"
_DASHBOARD_WAIT_S = 10.0


def submit_job(config: Config, address: str, *, working_dir: Path | None = None, waits: bool = True) -> int:
    """Run `plop-dist run` with this configuration as a Ray job and follow its log; returns the job's exit status.

    Paths in the configuration are those of the cluster's nodes, or lie in working_dir, which is sent there. The job
    runs in the interpreter that Ray runs in on the head. waits: False returns 0 as soon as the job is taken. Raises
    ConfigError when the address does not take jobs, WorkerError on an interrupt, after which the job goes on.
    """
    whole = _for_the_nodes(config, working_dir)
    # References stay: the nodes have their own environment, and a job's description is for all to read.
    references = {key: text for key, text in whole.references.items() if key != "cluster.address"}
    with tempfile.TemporaryDirectory() as directory:
        if working_dir is not None:
            shutil.copytree(working_dir, directory, dirs_exist_ok=True, symlinks=True)
        Path(directory, _CONFIG).write_text(whole.with_references(references).stored_yaml())
        shutil.copyfile(Path(__file__).with_name("start_job.sh"), Path(directory, _START))
        with _refused(address):
            client = _client(address)
            job = client.submit_job(entrypoint=f"sh {_START} {_CONFIG}", runtime_env={"working_dir": directory})
    if not waits:
        say(f"job {job} is taken\n{_way_on(job, address)}")
        return 0
    with suppress(KeyboardInterrupt):
        return _follow_job(client, job, address)
    error = WorkerError(f"no longer followed: job {job} goes on on the cluster.\n{_way_on(job, address)}")
    error.exit_status = 128 + signal.SIGINT
    raise error


def stop_job(job: str, address: str) -> None:
    """End a job that was submitted. Raises ConfigError for one that is not there or has ended."""
    with _refused(address):
        client = _client(address)
        status = client.get_job_status(job)
        stopped = not status.is_terminal() and client.stop_job(job)
    if not stopped:
        raise ConfigError(f"--stop {job}: it has ended already ({status.value.lower()}).")
    say(f"job {job} is being stopped; the same configuration goes on from what is on disk")


def _for_the_nodes(config: Config, working_dir: Path | None) -> Config:
    """Return the configuration for the head, where Ray is at hand; say which paths are those of this machine."""
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir} is no folder; give one with what the configuration names.")
    if working_dir is not None and not Path(config.run_dir).is_absolute():
        raise ConfigError(
            f"run_dir '{config.run_dir}' is relative, and would end with the job's copy of --working-dir; give an "
            "absolute one on storage that all nodes share."
        )
    whole = with_absolute_paths(config) if working_dir is None else config
    before, after = (it.stored() | {"cluster": {}} for it in (config, whole))
    if before != after:
        say(
            "relative paths are taken from here, and must be there on every node (or send a folder: --working-dir): "
            f"{', '.join(_changed(before, after))}",
            to_stderr=True,
        )
    return whole.model_copy(update={"cluster": whole.cluster.model_copy(update={"address": "auto"})})


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the values of the second tree that are others than in the first."""
    found: list[str] = []
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before[key], dict):
            found += _changed(before[key], value)
        elif value != before[key]:
            found.append(str(value))
    return found


def _way_on(job: str, address: str) -> str:
    return (
        f"follow it: ray job logs --follow --address {address} {job}\n"
        f"stop it: plop-dist submit --stop {job} --address {address}"
    )


@contextmanager
def _refused(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into one message."""
    try:
        yield
    except (RayError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--address {address} does not take this job: {first_line(error)}.") from error


def _client(address: str) -> JobSubmissionClient:
    """Return Ray's client, once something that can be a Ray has answered. Raises ConfigError saying what is wrong."""
    close_token()
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.scheme in ("http", "https"):
        _check_dashboard(address)
    elif url.scheme in ("", "ray") and address != "auto":
        _check_node(address, url)
    try:
        return JobSubmissionClient(address)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        if "token" in str(error).lower() or "auth" in type(error).__name__.lower():
            raise ConfigError(
                f"--address {address} does not take this job: the token is not the cluster's; give RAY_AUTH_TOKEN the "
                "one that Ray was started with there (its ~/.ray/auth_token)."
            ) from error
        raise


def _check_dashboard(address: str) -> None:
    """Raise ConfigError where what answers is not Ray's dashboard."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_DASHBOARD_WAIT_S).close()
    except urllib.error.HTTPError as error:  # it is there, and may ask for a token
        if error.code == http.HTTPStatus.NOT_FOUND:
            raise _no_dashboard(address, "what answers there is another web server, without /api/version") from error
    except http.client.HTTPException as error:
        raise _no_dashboard(address, "what listens there is no web server") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionResetError):
            raise _no_dashboard(address, "what listens there is no web server") from error
        if isinstance(reason, ssl.SSLError):
            raise _no_dashboard(address, f"{first_line(reason)}; does it want http:// instead?") from error
        raise _unreachable(address, reason) from error


def _check_node(address: str, url: SplitResult) -> None:
    """Raise ConfigError where nothing listens at host:port, or a web server does: Ray would wait for half a minute."""
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise _no_dashboard(address, "it is not http://HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_DASHBOARD_WAIT_S).close()
    except OSError as error:
        raise _unreachable(address, error) from error
    with suppress(http.client.HTTPException, OSError):  # it is no web server, and may be a Ray
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{url.netloc}/api/version", timeout=_DASHBOARD_WAIT_S).close()
        raise _no_dashboard(address, f"a web server listens there; write http://{url.netloc}")


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--address {address} cannot be reached: {first_line(error)}; is Ray running there, with its dashboard on an "
        "address for others (ray start --head --dashboard-host=0.0.0.0)?"
    )


def _no_dashboard(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"--address {address} is not Ray's dashboard: {why}; give the dashboard's URL (port 8265 unless it was "
        "changed), not the port that nodes join at (6379)."
    )


def run_script(config: Config, script: Path, directory: Path) -> int:
    """Run a shell script as a Ray job, from `directory`, and follow its log; returns its exit status.

    On the configured cluster, else on a local Ray that ends with it. Raises ConfigError, WorkerError.
    """
    with connected(config, takes_jobs=True):
        address = address_of(config)
        variables = {}
        if address is None:
            # The script's python is this one, and finds what lies in the current directory, as this one does.
            path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            packages = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
            variables = {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(filter(None, packages))}
        try:
            client = JobSubmissionClient(address or head_address())
            job = client.submit_job(
                entrypoint=f"cd {shlex.quote(str(directory))} && exec sh {shlex.quote(str(script))}",
                runtime_env={"env_vars": variables},
            )
        except (RayError, OSError, RuntimeError, ValueError) as error:
            raise WorkerError(
                f"{script} could not be submitted as a Ray job: {first_line(error)}; cluster.address must be of a Ray "
                "with its dashboard, or run the script yourself."
            ) from error
        try:
            return _follow_job(client, job, client.get_address())
        except (KeyboardInterrupt, SystemExit):  # what this run has started ends with it, as its workers do
            Asked(lambda: client.stop_job(job)).has_ended.wait(_DASHBOARD_WAIT_S)
            raise


def _follow_job(client: Any, job: str, address: str) -> int:
    """Print a job's log until it ends; returns its exit status, at least 1 if it failed.

    Raises WorkerError where the dashboard no longer answers: the job may go on.
    """
    left = f"Job {job} may go on.\n{_way_on(job, address)}"
    try:
        return Asked(lambda: _followed(client, job)).outcome(client.get_address(), left, _is_web_server)
    except PlopError:
        raise
    except Exception as error:  # Ray's client raises what its HTTP libraries do
        raise WorkerError(f"the log of job {job} cannot be followed: {first_line(error)}. {left}") from error


def _is_web_server(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=_DASHBOARD_WAIT_S).close()
    except urllib.error.HTTPError:
        return True  # it asks for a token
    except (http.client.HTTPException, OSError):
        return False
    return True


def _followed(client: Any, job: str) -> int:
    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            say(log_text(lines), end="", at_once=True)

    asyncio.run(follow())
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if status is JobStatus.SUCCEEDED:
        return 0
    return client.get_job_info(job).driver_exit_code or 1
