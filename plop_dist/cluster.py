"""Runs the ranks as Ray Train workers, restarts them when one dies, and submits Ray jobs: the only file with Ray."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from plop_dist import errors
from plop_dist.config import Config, parse_config
from plop_dist.errors import ConfigError, LayoutError, PlopError, UserError, WorkerError
from plop_dist.events import EventDisplay, EventWriter
from plop_dist.files import write_json
from plop_dist.run_dir import RunDir

_FAILURE = "failure.json"


def run_workers(config: Config, stages: Sequence[str], *, force: bool = False) -> None:
    """Run the stages on one Ray Train worker per rank and show their progress.

    A worker that dies takes its group down; all are restarted, cluster.max_failures times at most, and go on from
    what is on disk. Raises the workers' UserError as it is, and WorkerError naming rank and cause.
    """
    config = _absolute(config)
    run_dir = RunDir(config.run_dir)
    failure = run_dir.path / _FAILURE
    failure.unlink(missing_ok=True)
    launch = {"config": config.model_dump(mode="json"), "stages": list(stages), "force": force, "id": uuid.uuid4().hex}
    with _ray(config), _shown(run_dir.events):
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
                storage_path=str(run_dir.path / "ray"),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what workers raise in classes of its own, version by version
            raise _failure_of(failure) or WorkerError(f"the workers failed: {_last_line(error)}") from None
    if failure.is_file():
        raise _failure_of(failure) or WorkerError("the workers failed")


def submit_job(config: Config, address: str) -> int:
    """Run `plop-dist run` with this configuration as a Ray job and follow its log; returns its exit status, 0 or 1.

    Paths in the configuration are those of the cluster's nodes. Raises ConfigError when the address does not answer.
    """
    import asyncio

    from omegaconf import OmegaConf
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {address} does not answer as a Ray dashboard: {_last_line(error)}") from error
    tree = _absolute(config).model_dump(mode="json")
    tree["cluster"]["address"] = "auto"
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))
        job = client.submit_job(
            entrypoint="python -m plop_dist.cli run config.yaml", runtime_env={"working_dir": directory}
        )

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    return 0 if status is JobStatus.SUCCEEDED else 1


def _work(launch: dict[str, Any]) -> None:
    """One attempt of one rank, inside a Ray Train worker."""
    from plop_dist import ranks, worker

    config = parse_config(launch["config"], "the submitted configuration")
    run_dir = RunDir(config.run_dir)
    failure = run_dir.path / _FAILURE
    if failure.is_file():
        return  # bad input stays bad: the restart that Ray grants is not used
    attempts = run_dir.path / "ray" / launch["id"] / "attempt-started"
    is_first = ranks.agree(lambda: _touch(attempts))
    notify = EventWriter(run_dir.events)
    notify("worker", rank=ranks.rank(), pid=os.getpid(), text=f"rank {ranks.rank()} runs as process {os.getpid()}")
    try:
        worker.run_rank(config, launch["stages"], notify, force=launch["force"] and is_first)
    except Exception as error:
        is_user = isinstance(error, UserError)
        record = {"rank": ranks.rank(), "kind": type(error).__name__, "message": str(error), "user": is_user}
        with suppress(PlopError):
            if is_user and not failure.is_file():
                write_json(failure, record)
        if not is_user:
            write_json(run_dir.path / "ray" / launch["id"] / f"error-rank-{ranks.rank()}.json", record)
        raise


def _touch(path: Path) -> bool:
    """Create the file; return whether it was new."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return is_new


def _failure_of(path: Path) -> PlopError | None:
    """Return the error that a worker left behind, as its own class."""
    candidates = (
        [path] if path.is_file() else sorted(path.parent.glob("ray/*/error-rank-*.json"), key=_age, reverse=True)
    )
    for candidate in candidates:
        record = json.loads(candidate.read_text())
        kind = getattr(errors, str(record["kind"]), WorkerError)
        named = record["message"]
        if not record["user"] and not named.startswith("rank "):
            named = f"rank {record['rank']}: {named}"
        return kind(named) if issubclass(kind, PlopError) else WorkerError(named)
    return None


def _age(path: Path) -> float:
    return path.stat().st_mtime


@contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one on the loopback interface and end it afterwards."""
    if ray.is_initialized():
        yield
        return
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(config.cluster.cpus_per_worker)))),
        "TOKENIZERS_PARALLELISM": "false",
        # Ray's controller asks for the dashboard's state now and then; it is not an error that there is none.
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    }
    for name in ("PLOP_DIST_CACHE", "TORCH_EXTENSIONS_DIR", "HF_HOME", "HF_HUB_OFFLINE"):
        if name in os.environ:
            variables[name] = os.environ[name]
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "logging_level": logging.ERROR}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # As many CPUs as the ranks ask for: on a small machine they share cores instead of waiting for ever.
        wanted = int(config.parallel.world_size * config.cluster.cpus_per_worker) + 1
        options |= {
            "num_cpus": max(wanted, os.cpu_count() or 1),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = address
    try:
        ray.init(log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cluster.address '{address}' cannot be joined: {_last_line(error)}; check the address, or leave it out "
            "for a local Ray."
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


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


@contextmanager
def _shown(events: Path) -> Iterator[None]:
    """Show what rank 0 appends to events.jsonl while the block runs."""
    start = events.stat().st_size if events.is_file() else 0
    ended = threading.Event()
    with EventDisplay() as display:
        thread = threading.Thread(target=_follow, args=(events, start, ended, display), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=5)


def _follow(events: Path, position: int, ended: threading.Event, display: EventDisplay) -> None:
    rest = ""
    is_last = False
    while not is_last:
        is_last = ended.wait(0.2)
        if not events.is_file():
            continue
        with events.open(encoding="utf-8") as handle:
            handle.seek(position)
            rest += handle.read()
            position = handle.tell()
        *lines, rest = rest.split("\n")
        for line in lines:
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                kind = event.pop("event")
                event.pop("time", None)
                display(kind, **event)


def _absolute(config: Config) -> Config:
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
