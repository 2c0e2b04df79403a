"""Commands that look things up: what there is, what it costs, what is adapted already."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from plop_dist.cli.program import checked_config, command, way_on
from plop_dist.config import arguments as given
from plop_dist.config.command_help import LOOK_UP
from plop_dist.rundir import talk
from plop_dist.values.visible import say


@command(LOOK_UP)
def doctor() -> None:
    """Show what is installed here and whether it works: a table to paste into an issue."""
    from plop_dist.launch.doctor import examine

    failed = 0
    for finding in talk.each_apart(examine()):
        say(f"{finding.what:<22} {finding.status:<7} {finding.text}", at_once=True)
        failed += finding.status == "failed"
    raise typer.Exit(1 if failed else 0)


@command(LOOK_UP)
def targets(run_dir: given.OptionalRunDirectory = None, to: given.AnyTarget = None) -> None:
    """List the frameworks that `export` writes for: what each can and cannot express."""
    from plop_dist.registry import EXPORTERS, names
    from plop_dist.report.catalogue import print_targets
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(RunDir(run_dir).placement) if run_dir is not None else None
    print_targets(names(EXPORTERS) if to is None else (to,), placement)


@command(LOOK_UP)
def backends(name: given.BackendName = None) -> None:
    """List the frameworks that shard models (`parallel.backend`): the layouts of each, and what it cannot do."""
    from plop_dist.registry import BACKENDS, names
    from plop_dist.report.catalogue import print_backends

    print_backends(names(BACKENDS) if name is None else (name,))


@command(LOOK_UP)
def diff(
    run_dir: given.RunDirectory,
    adapter_config: given.AdapterConfig,
    target: given.ReadAs = None,
    as_json: given.AsJson = False,
) -> None:
    """Compare the placement with adapters that you have already, or with what another run chooses."""
    if (adapter_config / "scores.json").is_file():
        _diff_runs(run_dir, adapter_config, as_json)
        return
    from plop_dist.exporters.diff import difference
    from plop_dist.exporters.read_back import read_export
    from plop_dist.rundir.events import working
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(run_dir / "placement.json")
    with working("reading what the file adapts"):
        found = difference(placement, read_export(adapter_config, placement, target))
    if as_json:
        from plop_dist.report import machine

        machine.tell("diff", **machine.differing(found, run_dir))
    else:
        say(*found.lines())
        way_on("export", run_dir, "--to", "peft")


def _diff_runs(first: Path, second: Path, as_json: bool) -> None:
    from plop_dist.choose.decision import resolve_policy
    from plop_dist.choose.two_runs import compare_runs
    from plop_dist.rundir.events import working
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement
    from plop_dist.values.scores import Scores

    placement = RunDir(first).placement
    policy = Placement.from_file(placement).policy if placement.is_file() else {}
    with working("drawing the samples of both runs again"):
        scores, others = (Scores.from_file(RunDir(run_dir).scores) for run_dir in (first, second))
        found = compare_runs(scores, others, resolve_policy(**policy))
    if as_json:
        from plop_dist.report import machine

        machine.tell("diff-runs", **machine.runs_differing(found))
    else:
        say(*found.lines())
        way_on("place", first, "--explain")


@command(LOOK_UP)
def bench(
    config: given.OptionalConfigFile = None,
    overrides: given.Overrides = None,
    ranks: given.Ranks = 1,
    repeats: given.Repeats = 5,
    scale: given.Scale = False,
) -> None:
    """Measure on this machine what scoring costs."""
    from plop_dist.report import cost_tables
    from plop_dist.rundir.events import working

    if scale:
        from plop_dist.costs.scale import measure_scale

        with working("measuring what a module costs in models of three sizes"):
            measured = measure_scale([sys.executable, sys.argv[0]])
        cost_tables.print_scale(measured)
        return
    from plop_dist.costs.bench import run_bench

    if config is None:
        raise typer.BadParameter("Missing argument 'CONFIG'; only --scale needs none.")
    with working("measuring what scoring costs"):
        measured = run_bench(checked_config(config, overrides), ranks=ranks, repeats=repeats)
    cost_tables.print_bench(measured)
    way_on("score", config, *(overrides or []))
