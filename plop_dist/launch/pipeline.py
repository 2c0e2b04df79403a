"""The whole job: score -> place -> export -> train -> report, each stage only if it is not done yet."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from plop_dist import ranks
from plop_dist.checkpoints.owner import say_owner
from plop_dist.config.schema import Config
from plop_dist.errors import WorkerError
from plop_dist.launch.rank import run_rank
from plop_dist.registry import missing_extra
from plop_dist.report.page import write_report
from plop_dist.rundir.display import EventDisplay
from plop_dist.rundir.events import EventWriter, both, working
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.stored_config import kept_config
from plop_dist.rundir.taken import taken
from plop_dist.rundir.talk import kept_apart, rank_log
from plop_dist.rundir.trained import read_trained, write_trained
from plop_dist.values.files import write_json
from plop_dist.values.placement import Placement


def run(config: Config, command: str) -> RunDir:
    """Run every stage that is not done, write the report, and return the run directory.

    Raises UserError, or WorkerError, which has the exit status of the job of another engine that failed.
    """
    stages = Stages(config)
    wanted = ["score", "place", "export", *(["train"] if config.train.method != "none" else [])]
    if ranks.rank() == 0:
        stages.run_dir.check()
    with _alone(stages.run_dir, "run"):
        _check_engine(config)
        if any(map(stages.reason_to_run, wanted)):
            before = _state(stages.run_dir.training_summary)
            launch(stages, wanted, command)
            if _state(stages.run_dir.training_summary) != before:  # else it names a script that another has written
                run_job(stages)
        bring_back(stages)
        report(stages.run_dir)
    return stages.run_dir


def score(config: Config, command: str) -> RunDir:
    """Score, whether or not scores are there already, and return the run directory."""
    stages = Stages(config)
    with _alone(stages.run_dir, "score"):
        launch(stages, ["score"], command, force=True)
    return stages.run_dir


def compare(config: Config, command: str) -> RunDir:
    """Score, where that is not done, train the arms of compare.arms, and return the run directory."""
    from plop_dist.compare.comparison import check

    check(config)
    stages = Stages(config)
    with _alone(stages.run_dir, "compare"):
        launch(stages, ["score", "compare"], command)
        report(stages.run_dir)
    return stages.run_dir


def _alone(run_dir: RunDir, command: str) -> AbstractContextManager[None]:
    """Return what has the run directory to this run; the ranks beside rank 0 are part of the same."""
    return taken(run_dir.path, command, makes=True) if ranks.rank() == 0 else nullcontext()


def launch(stages: Stages, wanted: Sequence[str], command: str, *, force: bool = False) -> None:
    """Run stages on all ranks of the layout: in this process, in those a launcher started, or as Ray workers."""
    if ranks.rank() != 0:
        _run_stages(stages, wanted, force)
        return
    stages.run_dir.prepare()
    say_owner(stages.run_dir.path)
    with kept_config(stages, command):
        _run_stages(stages, wanted, force)


def _run_stages(stages: Stages, wanted: Sequence[str], force: bool) -> None:
    world_size = stages.config.parallel.world_size
    if ranks.launched_ranks() is not None or world_size == 1:
        rank = ranks.rank()
        log = stages.run_dir.log if rank == 0 else rank_log(stages.run_dir.log, rank)
        writer = EventWriter(stages.run_dir.events, stages.config.hide)
        with kept_apart(log) as own:
            if rank == 0:
                with EventDisplay(own) as display, both(writer, display) as notify:
                    run_rank(stages, wanted, notify, force=force)
            else:
                run_rank(stages, wanted, writer, force=force)
        return
    _with_ray("workers", f"a run on {world_size} ranks").run_workers(stages, wanted, force=force)


def run_job(stages: Stages) -> None:
    """Run the Ray job that the training stage has left for an engine of its own, if any, now that the ranks are gone.

    Called after a training stage that has just run: what a run directory brings along could name any script.
    train/job.json marks its success. Raises WorkerError with the job's exit status.
    """
    if stages.config.train.method != "grpo" or ranks.rank() != 0:
        return
    job = json.loads(stages.run_dir.training_summary.read_text()).get("job")
    if job is None:
        return
    if ranks.launched_ranks() is not None:
        raise WorkerError(
            f"{job['script']} was not started: the ranks that a launcher started keep their devices as long as this "
            "runs; start it yourself, or run plop-dist without the launcher."
        )
    status = _with_ray("jobs", "a Ray job").run_script(stages.config, Path(job["script"]), Path(job["directory"]))
    if status:
        error = WorkerError(f"{job['script']} ended with status {status}; its log is above. Run again to start anew.")
        error.exit_status = status
        raise error
    if not bring_back(stages):
        raise WorkerError(
            f"{job['script']} ended with status 0, but left no adapter beside itself; its log is above. Run again to "
            "start anew."
        )
    write_json(stages.run_dir.training_job, {**job, "exit_status": status})


def bring_back(stages: Stages) -> bool:
    """Take over adapter, rewards and steps from an engine's job that has ended, whoever started it, on rank 0.

    Returns whether they are there. Raises RunDirError for an adapter that is not the placement's.
    """
    run_dir = stages.run_dir
    if stages.config.train.method != "grpo" or ranks.rank() != 0 or not run_dir.training_summary.is_file():
        return False
    from plop_dist.training.train import external_engine

    engine, trained = external_engine(stages.config), read_trained(run_dir)
    if engine is None or trained is None or not trained.is_of_placement:
        return False
    if "adapter" in trained.summary:
        return True
    from plop_dist.training.external.bring_back import bring_back as take_over

    found = take_over(stages.config, Placement.from_file(run_dir.placement), engine)
    if found is None:
        return False
    kept = {key: value for key, value in trained.summary.items() if key != "note"}
    write_trained(run_dir, {**kept, **found})
    return True


def _check_engine(config: Config) -> None:
    """Raise UserError, before anything is scored, for what the training engine of the configuration does not train."""
    if config.train.method == "grpo":
        from plop_dist.training.train import check_trainable

        check_trainable(config)


def _state(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a file is written anew."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def report(run_dir: RunDir) -> Path:
    """Write RUN_DIR/report.html, on rank 0, and return its path. Raises UserError."""
    if ranks.rank() == 0:
        with working("writing the report", run_dir.log):
            write_report(run_dir)
    return run_dir.report


def command_line() -> str:
    """Return the command that started this process, as one can paste it."""
    return shlex.join(["plop-dist", *sys.argv[1:]])


def _with_ray(module: str, what: str) -> Any:
    try:
        return importlib.import_module(f"plop_dist.launch.{module}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, what) from error
