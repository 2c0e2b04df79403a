"""The whole job: score -> place -> export -> train -> report, each stage only if it is not done yet."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plop_dist import ranks
from plop_dist.config.schema import Config
from plop_dist.errors import WorkerError
from plop_dist.launch.rank import reason_to_run, run_rank
from plop_dist.registry import missing_extra
from plop_dist.rundir.events import EventWriter, both
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import write_json


def run(config: Config, command: str) -> Path:
    """Run every stage that is not done, and return the report's path.

    Raises UserError, or WorkerError, which has the exit status of the job of another engine that failed.
    """
    stages = ["score", "place", "export", *(["train"] if config.train.method != "none" else [])]
    if any(reason_to_run(config, stage) for stage in stages):
        launch(config, stages, command)
        run_job(config)
    return report(config.run_path)


def run_job(config: Config) -> None:
    """Run the Ray job that the training stage has left for an engine of its own, if any, now that the ranks are gone.

    train/job.json marks its success. Raises WorkerError with the job's exit status.
    """
    run_dir = RunDir(config.run_dir)
    summary = run_dir.train / "summary.json"
    job = json.loads(summary.read_text()).get("job") if config.train.method == "grpo" else None
    if job is None or ranks.rank() != 0:
        return
    if ranks.launched_ranks() is not None:
        raise WorkerError(
            f"{job['script']} was not started: the ranks that a launcher started keep their devices as long as this "
            "runs; start it yourself, or run plop-dist without the launcher."
        )
    status = _with_ray("jobs", "a Ray job").run_script(config, Path(job["script"]), Path(job["directory"]))
    if status:
        error = WorkerError(f"{job['script']} ended with status {status}; its log is above. Run again to start anew.")
        error.exit_status = status
        raise error
    write_json(run_dir.train / "job.json", {**job, "exit_status": status})


def score(config: Config, command: str) -> None:
    """Score, whether or not scores are there already."""
    launch(config, ["score"], command, force=True)


def launch(config: Config, stages: Sequence[str], command: str, *, force: bool = False) -> None:
    """Run stages on all ranks of the layout: in this process, in those a launcher started, or as Ray workers."""
    run_dir = RunDir(config.run_dir)
    if ranks.rank() != 0:
        _run_stages(config, run_dir, stages, force)
        return
    run_dir.prepare()
    with run_dir.kept_config(config, command):
        _run_stages(config, run_dir, stages, force)


def _run_stages(config: Config, run_dir: RunDir, stages: Sequence[str], force: bool) -> None:
    if ranks.launched_ranks() is not None or config.parallel.world_size == 1:
        with both(EventWriter(run_dir.events)) as notify:
            run_rank(config, stages, notify, force=force)
        return
    _with_ray("cluster", f"a run on {config.parallel.world_size} ranks").run_workers(config, stages, force=force)


def _with_ray(module: str, what: str) -> Any:
    try:
        return importlib.import_module(f"plop_dist.launch.{module}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, what) from error


def report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html and return its path. Raises UserError."""
    if ranks.rank() != 0:
        return run_dir / "report.html"
    try:
        write_report = importlib.import_module("plop_dist.report.page").write_report
    except ModuleNotFoundError as error:
        raise missing_extra(error, "the HTML report") from error
    return write_report(run_dir)


def command_line() -> str:
    """Return the command that started this process, as one can paste it."""
    return shlex.join(["plop-dist", *sys.argv[1:]])
