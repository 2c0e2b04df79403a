"""Joins or starts Ray, and runs the ranks as its Train workers, which are restarted when one dies."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from plop_dist import errors
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, LayoutError, PlopError, UserError, WorkerError
from plop_dist.rundir.attempts import all_found_it, begin_attempt, read_records, records_of
from plop_dist.rundir.events import EventHandler, EventWriter, shown
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import write_json

_MOST_LOCAL_RANKS_PER_CPU = 16


def run_workers(config: Config, stages: Sequence[str], *, force: bool = False) -> None:
    """Run the stages on one Ray Train worker per rank and show their progress.

    A worker that dies takes its group down; all are restarted, cluster.max_failures times at most, and go on from
    what is on disk. Raises the workers' UserError as it is, and WorkerError naming rank and cause.
    """
    config = with_absolute_paths(config)
    run_dir = RunDir(config.run_dir)
    launch = {"config": config.model_dump(mode="json"), "stages": list(stages), "force": force, "id": uuid.uuid4().hex}
    launch["directory"] = os.getcwd()
    records = records_of(run_dir, launch["id"])
    with connected(config), shown(run_dir.events):
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        per_worker = _resources_per_worker(config, has_gpu)
        _check_resources(config, per_worker)
        trainer = TorchTrainer(
            _work,
            train_loop_config=launch,
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout_s=int(config.cluster.timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=config.parallel.world_size, use_gpu=has_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                name=launch["id"],
                storage_path=str(records.parent),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
                worker_runtime_env={"env_vars": _environment(config)},
                callbacks=[_TellRestarts(run_dir.events, config.cluster.max_failures)],
            ),
        )
        try:
            _fit(trainer)
        except Exception as error:  # Ray wraps what workers raise in classes of its own, version by version
            raise _cause(records, getattr(error, "worker_failures", {})) or WorkerError(
                f"the workers failed: {_last_line(error)}"
            ) from None
    failure = _cause(records, {})
    if failure is not None:
        raise failure
    shutil.rmtree(records, ignore_errors=True)


class _TellRestarts(UserCallback):
    """Says which rank's death the workers are restarted after; Ray calls it in its controller's process."""

    def __init__(self, events: Path, max_failures: int) -> None:
        self._events, self._max_failures, self._num_failures = events, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note the restart; a worker that raised has left its own record."""
        self._num_failures += 1
        dead = sorted(rank for rank, error in worker_exceptions.items() if _is_of_dead_process(error))
        if dead and self._num_failures <= self._max_failures:
            text = (
                f"rank {dead[0]}: its process died (killed, out of memory, or a lost node); the workers are restarted, "
                f"{self._num_failures} of {self._max_failures} times (cluster.max_failures), and go on from what is on "
                "disk"
            )
            with suppress(PlopError):
                EventWriter(self._events)("status", text=text)


def _fit(trainer: TorchTrainer) -> None:
    """Run the workers to their end, so that an interrupt (SIGINT, SIGTERM) raises here and ends them.

    Ray Train would answer SIGINT with its own exit, without a word to the user; it leaves signals alone in a thread.
    """
    raised: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)

    def terminate(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if raised:
        raise raised[0]


def _work(launch: dict[str, Any]) -> None:
    """One attempt of one rank, inside a Ray Train worker."""
    from plop_dist import ranks
    from plop_dist.launch.rank import run_rank

    sys.path.append(launch["directory"])  # where a user's module:function lies
    config = parse_config(launch["config"], "the submitted configuration")
    run_dir = RunDir(config.run_dir)
    records = records_of(run_dir, launch["id"])
    attempt = ranks.agree(lambda: begin_attempt(records))
    if attempt == 0:
        return  # bad input stays bad: the restart that Ray grants is not used
    notify = EventWriter(run_dir.events)
    if ranks.rank() == 0:
        logging.getLogger("plop_dist").setLevel(logging.INFO)
        logging.getLogger("plop_dist").addHandler(EventHandler(notify))
    notify("worker", rank=ranks.rank(), pid=os.getpid(), attempt=attempt)
    try:
        run_rank(config, launch["stages"], notify, force=launch["force"] and attempt == 1)
    except Exception as error:
        is_user = isinstance(error, UserError)
        with suppress(PlopError):  # a full disk is likely what is being reported
            write_json(
                records / f"error-rank-{ranks.rank()}.json",
                {"rank": ranks.rank(), "kind": type(error).__name__, "message": str(error), "user": is_user},
            )
        if not (is_user and all_found_it(records, config.parallel.world_size)):
            raise


def _cause(records: Path, raised: dict[int, Exception]) -> PlopError | None:
    """Return the first error of the last attempt as its own class; `raised` is what Ray has seen, by rank."""
    found = read_records(records)
    if found and found[0]["user"]:
        return getattr(errors, found[0]["kind"], UserError)(found[0]["message"])
    dead = sorted(rank for rank, error in raised.items() if _is_of_dead_process(error))
    if dead:
        return WorkerError(
            f"rank {dead[0]}: its process died without an error of its own: killed, out of memory, or a lost node. "
            "Run again to go on from what is on disk; cluster.max_failures allows more restarts."
        )
    if found:
        first, message = found[0]["rank"], found[0]["message"]
        return WorkerError(message if message.startswith("rank ") else f"rank {first}: {message}")
    for rank, error in sorted(raised.items()):
        return error if isinstance(error, PlopError) else WorkerError(f"rank {rank}: {_last_line(error)}")
    return None


def _is_of_dead_process(error: Exception) -> bool:
    # Ray Train 2.60 wraps what its health check has met into a class that it does not export.
    return isinstance(getattr(error, "health_check_failure", error), RayError)


@contextmanager
def connected(config: Config, *, takes_jobs: bool = False) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one and end it afterwards. takes_jobs: with its dashboard.

    A Ray that this process has joined already is used and left as it is.
    """
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if address is None:
        num_cpus = os.cpu_count() or 1
        most = _MOST_LOCAL_RANKS_PER_CPU * num_cpus
        if config.parallel.world_size > most:
            raise LayoutError(
                f"the parallel sizes make {config.parallel.world_size} ranks, but without cluster.address all of them "
                f"run on this machine, whose {num_cpus} CPUs take {most} at most; set cluster.address, or lower them."
            )
        # As many CPUs as the ranks ask for: on a small machine they share cores instead of waiting for ever.
        wanted = int(config.parallel.world_size * config.cluster.cpus_per_worker) + 1
        options = {"num_cpus": max(wanted, num_cpus), "include_dashboard": takes_jobs}
    try:
        if address is not None:
            _check_answers(address)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if address is None:
            raise WorkerError(
                f"a local Ray could not be started: {_last_line(error)}; its logs are in /tmp/ray/session_latest/logs."
            ) from error
        raise ConfigError(
            f"cluster.address '{address}' cannot be joined: {_last_line(error)}; give host:port of `ray start --head` "
            "(the dashboard's URL is for `plop-dist submit`), or leave it out for a local Ray."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise OSError or ValueError where nothing listens: Ray 2.60 itself tries again for more than ten minutes."""
    if address in ("auto", "local"):
        return
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.scheme not in ("", "ray") or not url.hostname or not url.port:
        raise ValueError("it is not host:port, ray://host:port or auto")
    socket.create_connection((url.hostname, url.port), timeout=10).close()


def _environment(config: Config) -> dict[str, str]:
    """Return the workers' environment variables: threads as many as cores granted, and this process's caches."""
    variables = {
        "OMP_NUM_THREADS": str(max(1, int(config.cluster.cpus_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "PLOP_DIST_CACHE" in os.environ:
        # Compiling DeepSpeed's extension takes minutes; without this torch keeps it in the user's own cache.
        variables["TORCH_EXTENSIONS_DIR"] = str(Path(os.environ["PLOP_DIST_CACHE"]) / "torch_extensions")
    forwarded = ("OMP_NUM_THREADS", "PLOP_DIST_CACHE", "TORCH_EXTENSIONS_DIR", "HF_HOME", "HF_HUB_OFFLINE")
    return variables | {name: os.environ[name] for name in forwarded if name in os.environ}


def _resources_per_worker(config: Config, has_gpu: bool) -> dict[str, float]:
    wanted = config.cluster.gpus_per_worker
    gpus = (1.0 if has_gpu else 0.0) if wanted == "auto" else float(wanted)
    return {"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def _check_resources(config: Config, per_worker: dict[str, float]) -> None:
    """Raise LayoutError where the cluster could never place all workers: Ray would wait in silence."""
    available = ray.cluster_resources()
    for name, amount in per_worker.items():
        needed = amount * config.parallel.world_size
        if needed > available.get(name, 0):
            raise LayoutError(
                f"{config.parallel.world_size} workers need {needed:g} {name}s, but the Ray cluster has "
                f"{available.get(name, 0):g}; lower "
                f"cluster.{name.lower()}s_per_worker or the parallel sizes, or add nodes."
            )


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with local paths made absolute: workers run in other directories."""

    def absolute(value: str | None) -> str | None:
        return str(Path(value).resolve()) if value and Path(value).exists() else value

    train = config.train.model_copy(
        update={name: absolute(getattr(config.train, name)) for name in ("data_path", "eval_path")}
    )
    model = config.model.model_copy(
        update={name: absolute(getattr(config.model, name)) for name in ("name_or_path", "checkpoint")}
    )
    data = config.data.model_copy(update={"path": absolute(config.data.path)})
    return config.model_copy(
        update={"run_dir": str(Path(config.run_dir).resolve()), "train": train, "model": model, "data": data}
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
