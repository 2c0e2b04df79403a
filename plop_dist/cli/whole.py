"""Commands that do the whole of it: here, or as a job of a cluster."""

from __future__ import annotations

from typing import Any

import typer

from plop_dist.cli.program import checked_config, command, speaks, way_on
from plop_dist.config import arguments as given
from plop_dist.config.command_help import WHOLE
from plop_dist.errors import ConfigError


@command(WHOLE)
def run(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Score, place, export, train (where `train.method` says so) and report."""
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.launch import pipeline
    from plop_dist.report import closing, terminal
    from plop_dist.values.placement import Placement

    loaded = checked_config(config, overrides)
    run_dir = pipeline.run(loaded, pipeline.command_line())
    if speaks():
        placement = Placement.from_file(run_dir.placement)
        terminal.print_types(placement.source, placement)
        terminal.print_diagnostics(diagnose(placement.source, placement))
        terminal.print_training(run_dir)
        closing.print_outdated(run_dir)
        exports = [run_dir.exports / target for target in loaded.export.targets]
        adapter = [run_dir.train / "adapter"] if loaded.train.method != "none" else []
        closing.print_files(run_dir.scores, run_dir.placement, *exports, *adapter, run_dir.report)
        way_on("targets", run_dir.path)


@command(WHOLE)
def compare(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Train placements of equal size against each other: does the choice pay on this model and data?"""
    from plop_dist.compare.result import Comparison
    from plop_dist.launch import pipeline
    from plop_dist.report import closing, comparison

    loaded = checked_config(config, overrides)
    run_dir = pipeline.compare(loaded, pipeline.command_line())
    if speaks():
        comparison.print_comparison(Comparison.from_file(run_dir.comparison))
        closing.print_files(run_dir.comparison, run_dir.report)
        way_on("place", run_dir.path, "--explain")


@command(WHOLE)
def submit(
    config: given.JobConfigFile = None,
    overrides: given.Overrides = None,
    address: given.Address = "http://127.0.0.1:8265",
    working_dir: given.WorkingDir = None,
    no_wait: given.NoWait = False,
    stop: given.Stop = None,
) -> None:
    """Do what `run` does as a job on a Ray cluster, and follow its log."""
    from plop_dist.registry import missing_extra

    if (config is None) == (stop is None):
        raise ConfigError("plop-dist submit takes either CONFIG, to start a job, or --stop JOB.")
    loaded: Any = checked_config(config, overrides) if config is not None else None
    try:
        from plop_dist.launch import jobs
    except ModuleNotFoundError as error:
        raise missing_extra(error, "plop-dist submit") from error
    if stop is not None:
        jobs.stop_job(stop, address)
    else:
        raise typer.Exit(jobs.submit_job(loaded, address, working_dir=working_dir, waits=not no_wait))
