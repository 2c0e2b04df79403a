"""Joins a Ray cluster or starts a local one, and says what the workers need there."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, LayoutError, WorkerError
from plop_dist.launch import inside_ray
from plop_dist.launch.joinable import check_joinable

_MOST_LOCAL_RANKS_PER_CPU = 16

logger = logging.getLogger(__name__)


@contextmanager
def connected(config: Config, *, takes_jobs: bool = False) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one and end it afterwards. takes_jobs: with its dashboard.

    A Ray that this process has joined already is used and left as it is. One that a thread is still inside of, after an
    interrupt or where its head is gone, is killed if it is local, and left otherwise. SIGTERM raises SystemExit(143) in
    the block.
    """
    previous = signal.getsignal(signal.SIGTERM)
    starts = not ray.is_initialized()
    try:
        if starts:
            try:
                _start_or_join(config, takes_jobs)
            except SystemExit as stop:
                raise (SystemExit(128 + signal.SIGTERM) if stop.code == signal.SIGTERM else stop) from None
        _answer_sigterm(_terminate)  # after Ray, which answers with another status
        yield
    finally:
        if starts and not inside_ray.is_inside():
            ray.shutdown()
        elif starts and address_of(config) is None:
            inside_ray.end_local()
        if previous is not None:  # one that was not set from Python cannot be set again
            _answer_sigterm(previous)


def _terminate(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _answer_sigterm(answer: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, answer)


def _start_or_join(config: Config, takes_jobs: bool) -> None:
    address = address_of(config)
    close_token(make=address is None)
    if address is None:
        options = _local_options(config)
        try:
            # Without an address Ray joins one that `ray start` has left running, or lying, on this machine.
            ray.init(
                address="local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=takes_jobs,
                **options,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise WorkerError(
                f"a local Ray could not be started: {last_line(error)}; its logs are in /tmp/ray/session_latest/logs."
            ) from error
        return
    try:
        check_joinable(address)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, address=address)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        given = "cluster.address" if address == config.cluster.address else "the environment variable RAY_ADDRESS"
        is_token = isinstance(error, (PermissionError, AuthenticationError))
        remedy = (
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what Ray was started with there (its ~/.ray/auth_token)."
            if is_token
            else "give host:port of `ray start --head` (the dashboard's URL is for `plop-dist submit`), or "
            "cluster.address=local for a Ray of this run's own."
        )
        raise ConfigError(f"{given} '{address}' cannot be joined: {last_line(error)}; {remedy}") from error


def address_of(config: Config) -> str | None:
    """Return which Ray is joined, None for a local one: what is configured, else RAY_ADDRESS, as Ray reads it."""
    address = config.cluster.address
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address or "local"
    return None if address == "local" else address


def close_token(*, make: bool = False) -> None:
    """Make Ray's token readable by this user alone before Ray reads or writes it; say so where it was not.

    make: also where there is none yet, which Ray 2.60 would leave readable by everybody. Who has the token runs code as
    this user on every Ray that was started with it.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    is_given = "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    try:
        if make and not is_given and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
                handle.write(secrets.token_hex(32))
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            path.chmod(0o600)
            logger.warning(
                "Ray's token %s could be read by other users (mode %04o) and is closed now (0600); whoever has read it "
                "can run code as you on a Ray that uses it: delete it to get another, and restart such clusters",
                path,
                mode,
            )
    except (FileExistsError, FileNotFoundError):  # another process has just made it; there is none
        return
    except OSError as error:
        logger.warning("Ray's token %s cannot be closed to other users: %s", path, error.strerror or error)


def _local_options(config: Config) -> dict[str, Any]:
    num_cpus, world_size = os.cpu_count() or 1, config.parallel.world_size
    most = _MOST_LOCAL_RANKS_PER_CPU * num_cpus
    if world_size > most:
        raise LayoutError(
            f"the parallel sizes make {world_size} ranks, but without cluster.address all of them run on this machine, "
            f"whose {num_cpus} CPUs take {most} at most; set cluster.address, or lower them."
        )
    # As many CPUs as the ranks ask for: on a small machine they share cores instead of waiting for ever.
    return {"num_cpus": max(int(world_size * config.cluster.cpus_per_worker) + 1, num_cpus)}


def resources_per_worker(config: Config) -> dict[str, float]:
    """Return what each worker asks of the cluster that was joined."""
    wanted = config.cluster.gpus_per_worker
    gpus = (1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0) if wanted == "auto" else float(wanted)
    return {"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def last_line(error: BaseException) -> str:
    """Return the last line that an error of Ray's says, which is the cause of those above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
