"""Runs the ranks as Ray Train workers, which are restarted when one dies."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from plop_dist import ranks
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import PlopError, UserError, WorkerError
from plop_dist.launch.asked import answered
from plop_dist.launch.capacity import living_nodes
from plop_dist.launch.causes import before_start, cause, found_no_room
from plop_dist.launch.cluster import address_of, close_token, connected, last_line, resources_per_worker
from plop_dist.launch.environment import worker_environment, worker_secrets
from plop_dist.launch.fit import fit
from plop_dist.launch.group import GroupConfig
from plop_dist.launch.orphans import ending_with_driver
from plop_dist.launch.rank import run_rank
from plop_dist.launch.rank_places import Places
from plop_dist.launch.same_files import Seen, check_same_files, seen_here, with_absolute_paths
from plop_dist.launch.waiting import wait_for_room
from plop_dist.rundir import talk
from plop_dist.rundir.attempts import begin_attempt, records_of, write_record
from plop_dist.rundir.events import EventHandler, EventWriter, shown
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.talk import kept_apart, rank_log

_NODE_LABEL = "ray.io/node-id"  # which every node of a Ray cluster has


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
    seen: Seen


def run_workers(stages: Stages, wanted: Sequence[str], *, force: bool = False) -> None:
    """Run the wanted stages on one Ray Train worker per rank and show their progress.

    A worker that dies takes its group down; all are restarted, cluster.max_failures times at most, and go on from
    what is on disk. Raises the workers' UserError as it is, and WorkerError naming rank and cause.
    """
    config = with_absolute_paths(stages.config)
    values, references = config.model_dump(mode="json"), dict(config.references)
    launch = Launch(
        uuid.uuid4().hex,
        values,
        references,
        list(wanted),
        force,
        os.getcwd(),
        _log_of(stages),
        seen_here(Stages(config)),
    )
    variables, secrets = worker_environment(config), worker_secrets(config)
    events, records = stages.run_dir.events, records_of(stages.run_dir, launch.id).resolve()
    notify = EventWriter(events, config.hide)
    close_token()  # here, so that what it says does not go where libraries talk
    with kept_apart(stages.run_dir.log) as own, shown(events, own):
        address = address_of(config)
        notify("phase", text="starting Ray" if address is None else f"joining Ray at {address}")
        with connected(config):
            _Attempts(config, launch, variables, secrets, records, notify, stages.run_dir.stop_request).run()
    shutil.rmtree(records, ignore_errors=True)


def _log_of(stages: Stages) -> str:
    return str((talk.options.log_file or stages.run_dir.log).resolve())


@dataclass
class _Attempts:
    """The workers of one launch, started anew where one has died, each time on the nodes that there are then."""

    config: Config
    launch: Launch
    variables: dict[str, str]
    secrets: dict[str, str]
    records: Path
    notify: EventWriter
    stop_request: Path
    num_failures: int = 0
    num_started: int = 0

    def run(self) -> None:
        """Run the workers to their end. Raises the UserError or WorkerError that they ended with."""
        most = self.config.cluster.max_failures
        while True:
            failure = self._failure()
            if failure is None:
                return
            self.num_failures += 1
            if isinstance(failure, UserError) or self.num_failures > most:
                raise failure
            gc.collect()  # what Ray raised goes, and with it the controller that still has the workers' room
            self.notify(
                "status",
                text=f"{failure}; the workers are restarted, {self.num_failures} of {most} times "
                "(cluster.max_failures), and go on from what is on disk",
            )

    def _failure(self) -> PlopError | None:
        """Run one attempt; return what it failed on. Raises where another attempt would not help."""
        until = time.monotonic() + self.config.cluster.start_timeout_s
        per_worker = answered(lambda: resources_per_worker(self.config))
        while True:
            places = wait_for_room(self.config, per_worker, self.notify, until=until, again=self.num_started > 0)
            names = {node.id: node.name for node in answered(living_nodes)}
            hosts = [names.get(node, "a lost node") for node in places.nodes]
            self.notify("phase", text=f"starting {len(hosts)} workers on {', '.join(dict.fromkeys(hosts))}")
            self.num_started += 1
            try:
                fit(self._trainer(per_worker, places), self.stop_request)
            except PlopError:
                raise
            except Exception as error:  # Ray wraps what workers raise in classes of its own, version by version
                if found_no_room(error):  # others were faster, or nodes have gone
                    if time.monotonic() < until:
                        continue
                    raise WorkerError(
                        f"Ray has not placed {len(hosts)} workers on {', '.join(dict.fromkeys(hosts))} within "
                        f"cluster.start_timeout_s ({self.config.cluster.start_timeout_s:g} s), where they had room: "
                        "nodes come and go, or others were faster each time (ray status)."
                    ) from error
                raised = getattr(error, "worker_failures", {})
                found = before_start(error) or cause(self.records, raised, hosts)
                return found or WorkerError(f"the workers failed: {last_line(error)}")
            return None

    def _trainer(self, per_worker: dict[str, float], places: Places) -> TorchTrainer:
        """Return Ray Train's trainer over the ranks, each on its node."""
        use_gpu, secrets, launch = "GPU" in per_worker, self.secrets, self.launch
        # Ray shows a worker without GPUs of its own all of its node's.
        variables = self.variables if use_gpu else {**self.variables, "CUDA_VISIBLE_DEVICES": ""}

        def work() -> None:
            os.environ.update(secrets)
            _work(launch)

        return TorchTrainer(
            work,  # what it is told is in its closure: Ray shows a train_loop_config to whoever asks
            torch_config=GroupConfig(
                backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(self.config.cluster.timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=len(places.nodes),
                use_gpu=use_gpu,
                resources_per_worker=per_worker,
                label_selector=[{_NODE_LABEL: node} for node in places.nodes],
            ),
            run_config=RunConfig(
                name=f"ray-{self.num_started}",
                storage_path=str(self.records),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                worker_runtime_env={"env_vars": variables},
            ),
        )


def _work(launch: Launch) -> None:
    """One attempt of one rank, inside a Ray Train worker."""
    sys.path.append(launch.directory)  # where a user's module:function lies
    stages = Stages(parse_config(launch.config, "the submitted configuration", launch.references))
    check_same_files(stages, launch.seen)
    records = records_of(stages.run_dir, launch.id)
    attempt = ranks.agree(lambda: begin_attempt(records))
    notify = EventWriter(stages.run_dir.events, stages.config.hide)
    if ranks.rank() == 0:
        logging.getLogger("plop_dist").setLevel(logging.INFO)
        logging.getLogger("plop_dist").addHandler(EventHandler(notify))
    notify("worker", rank=ranks.rank(), pid=os.getpid(), host=socket.gethostname(), attempt=attempt)
    try:
        with (
            ending_with_driver(stages.run_dir.path, launch.seen.mark),
            kept_apart(rank_log(Path(launch.log), ranks.rank())),
        ):
            run_rank(stages, launch.wanted, notify, force=launch.force and attempt == 1)
    except SystemExit:
        return  # asked to stop: the driver, which knows of it, ends the run
    except Exception as error:
        with suppress(PlopError):  # a full disk is likely what is being reported
            write_record(records, ranks.rank(), error, stages.config.hide)
        raise
