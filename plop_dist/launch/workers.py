"""Runs the ranks as Ray Train workers, which are restarted when one dies."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from plop_dist import errors, ranks
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import PlopError, UserError, WorkerError
from plop_dist.launch.cluster import (
    check_resources,
    close_token,
    connected,
    last_line,
    resources_per_worker,
    with_absolute_paths,
    worker_environment,
)
from plop_dist.launch.rank import run_rank
from plop_dist.rundir import talk
from plop_dist.rundir.attempts import all_found_it, begin_attempt, read_records, records_of, write_record
from plop_dist.rundir.events import EventHandler, EventWriter, shown
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.talk import kept_apart, rank_log

_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Launch:
    """What every worker is told, in plain values: which stages of which configuration, and where it was started."""

    id: str
    config: dict[str, Any]
    references: dict[str, str]
    wanted: list[str]
    force: bool
    directory: str
    log: str


def run_workers(stages: Stages, wanted: Sequence[str], *, force: bool = False) -> None:
    """Run the wanted stages on one Ray Train worker per rank and show their progress.

    A worker that dies takes its group down; all are restarted, cluster.max_failures times at most, and go on from
    what is on disk. Raises the workers' UserError as it is, and WorkerError naming rank and cause.
    """
    config = with_absolute_paths(stages.config)
    values, references = config.model_dump(mode="json"), dict(config.references)
    launch = Launch(uuid.uuid4().hex, values, references, list(wanted), force, os.getcwd(), _log_of(stages))
    events, records = stages.run_dir.events, records_of(stages.run_dir, launch.id).resolve()
    notify = EventWriter(events, config.hide)
    close_token()  # here, so that what it says does not go where libraries talk
    with kept_apart(stages.run_dir.log) as own, shown(events, own):
        notify("phase", text=f"joining Ray at {config.cluster.address}" if config.cluster.address else "starting Ray")
        with connected(config):
            trainer = _trainer(config, launch, events.resolve(), records)
            notify("phase", text=f"starting {config.parallel.world_size} workers")
            _run(trainer, records, stages.run_dir.stop_request)
    failure = _cause(records, {})
    if failure is not None:
        raise failure
    shutil.rmtree(records, ignore_errors=True)


def _run(trainer: TorchTrainer, records: Path, stop_request: Path) -> None:
    """Run the workers to their end. Raises as run_workers does."""
    try:
        _fit(trainer, stop_request)
    except Exception as error:  # Ray wraps what workers raise in classes of its own, version by version
        raise _cause(records, getattr(error, "worker_failures", {})) or WorkerError(
            f"the workers failed: {last_line(error)}"
        ) from None


def _log_of(stages: Stages) -> str:
    return str((talk.options.log_file or stages.run_dir.log).resolve())


def _trainer(config: Config, launch: Launch, events: Path, records: Path) -> TorchTrainer:
    """Return Ray Train's trainer over the ranks. Raises LayoutError where the cluster is too small for them."""
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    per_worker = resources_per_worker(config, has_gpu)
    check_resources(config, per_worker)
    backend, timeout_s = "cpu:gloo,cuda:nccl" if has_gpu else "gloo", int(config.cluster.timeout_s)
    return TorchTrainer(
        _work,
        train_loop_config=asdict(launch),
        torch_config=TorchConfig(backend=backend, timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.parallel.world_size, use_gpu=has_gpu, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=launch.id,
            storage_path=str(records.parent),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config)},
            callbacks=[_TellRestarts(events, config.cluster.max_failures)],
        ),
    )


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


def _fit(trainer: TorchTrainer, stop_request: Path) -> None:
    """Run the workers to their end, so that an interrupt (SIGINT, SIGTERM) raises here and ends them.

    Ray Train would answer SIGINT with its own exit, without a word to the user; it leaves signals alone in a thread.
    Workers that train are asked to stop with a checkpoint first; a second signal, or a long step, does not wait.
    """
    raised: list[Exception] = []
    # Not join(): in CPython 3.12 a thread counts as ended once an interrupt has come through that.
    has_ended = threading.Event()

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)
        finally:
            has_ended.set()

    def terminate(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        threading.Thread(target=fit, daemon=True).start()
        try:
            has_ended.wait()
        except (KeyboardInterrupt, SystemExit):
            if stop_request.is_file():
                stop_request.write_text("stop")
                has_ended.wait(_STOP_SECONDS)
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if raised:
        raise raised[0]


def _work(told: dict[str, Any]) -> None:
    """One attempt of one rank, inside a Ray Train worker."""
    launch = Launch(**told)
    sys.path.append(launch.directory)  # where a user's module:function lies
    stages = Stages(parse_config(launch.config, "the submitted configuration", launch.references))
    records = records_of(stages.run_dir, launch.id)
    attempt = ranks.agree(lambda: begin_attempt(records))
    if attempt == 0:
        return  # bad input stays bad: the restart that Ray grants is not used
    notify = EventWriter(stages.run_dir.events, stages.config.hide)
    if ranks.rank() == 0:
        logging.getLogger("plop_dist").setLevel(logging.INFO)
        logging.getLogger("plop_dist").addHandler(EventHandler(notify))
    notify("worker", rank=ranks.rank(), pid=os.getpid(), attempt=attempt)
    try:
        with kept_apart(rank_log(Path(launch.log), ranks.rank())):
            run_rank(stages, launch.wanted, notify, force=launch.force and attempt == 1)
    except SystemExit:
        return  # asked to stop: the driver, which knows of it, ends the run
    except Exception as error:
        with suppress(PlopError):  # a full disk is likely what is being reported
            write_record(records, ranks.rank(), error, stages.config.hide)
        is_user = isinstance(error, UserError)
        if not (is_user and all_found_it(records, ranks.rank(), stages.config.parallel.world_size)):
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
        return error if isinstance(error, PlopError) else WorkerError(f"rank {rank}: {last_line(error)}")
    return None


def _is_of_dead_process(error: Exception) -> bool:
    # Ray Train 2.60 wraps what its health check has met into a class that it does not export.
    return isinstance(getattr(error, "health_check_failure", error), RayError)
