"""Commands for the steps of a run, one by one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from plop_dist.cli.program import checked_config, command, speaks, way_on
from plop_dist.config import arguments as given
from plop_dist.config.command_help import STEPS
from plop_dist.errors import ExportError, PlopError
from plop_dist.values.visible import say


@command(STEPS)
def score(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Measure the NFN of every linear module; writes RUN_DIR/scores.json."""
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.launch import pipeline
    from plop_dist.report import closing, terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.scores import Scores

    loaded = checked_config(config, overrides)
    before = _scored_modules(RunDir(loaded.run_dir).scores)
    run_dir = pipeline.score(loaded, pipeline.command_line())
    if speaks():
        scores = Scores.from_file(run_dir.scores)
        terminal.print_types(scores)
        terminal.print_diagnostics(diagnose(scores))
        if before not in (None, scores.modules):
            closing.print_older_than_scores(run_dir)
        closing.print_files(run_dir.scores)
        way_on("place", run_dir.path)


@command(STEPS)
def place(
    run_dir: given.RunDirectory,
    overrides: given.PlacementOverrides = None,
    explain: given.Explain = False,
    sweep: given.Sweep = False,
    dry_run: given.DryRun = False,
    as_json: given.AsJson = False,
) -> None:
    """Choose the modules that get adapters, from the scores; writes RUN_DIR/placement.json."""
    from plop_dist.choose.beside import beside
    from plop_dist.choose.decision import decide
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.choose.explain import explain as build_explanation
    from plop_dist.choose.place import placement_of
    from plop_dist.choose.sweep import sweep_of
    from plop_dist.report import closing, machine, terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.rundir.taken import taken
    from plop_dist.values.scores import Scores

    paths = RunDir(run_dir)
    scores = Scores.from_file(paths.scores)
    decision = decide(scores, placement_config(paths, overrides or []))
    placement = placement_of(decision)
    if not dry_run:
        with taken(paths.path, "place"):
            placement.to_file(paths.placement)
    if as_json:
        machine.tell("place", **machine.placed(paths, placement, diagnose(scores, placement, decision), dry_run))
        return
    terminal.print_types(scores, placement)
    terminal.print_beside(beside(decision, placement))
    if explain:
        terminal.print_explanation(build_explanation(scores, placement, decision))
    if sweep:
        terminal.print_sweep(sweep_of(decision))
    terminal.print_diagnostics(diagnose(scores, placement, decision))
    if dry_run:
        say(f"{paths.placement} stays as it was (--dry-run)")
        way_on("place", run_dir, *(overrides or []))
        return
    closing.print_outdated(paths)
    closing.print_files(paths.placement)
    way_on("export", run_dir, "--to", "peft")


@command(STEPS)
def export(
    run_dir: given.RunDirectory,
    to: given.Target,
    engine: given.Engine = None,
    widen: given.Widen = False,
    as_json: given.AsJson = False,
) -> None:
    """Write the placement in your training framework's own format; prints the flags to paste."""
    from plop_dist.choose.remedies import explained
    from plop_dist.exporters.fits import fits
    from plop_dist.exporters.text import one_line
    from plop_dist.exporters.write import write_export
    from plop_dist.report import machine
    from plop_dist.report.catalogue import print_fits
    from plop_dist.report.closing import path_from_here, print_of_older_scores
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.made_from import placement_mark
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.rundir.taken import taken
    from plop_dist.values.placement import Placement

    paths = RunDir(run_dir)
    placement, mark = Placement.from_file(paths.placement), placement_mark(paths)
    if to == given.NO_TARGET:
        found = fits(placement)
        if as_json:
            machine.tell("targets", **machine.fitted(run_dir, found))
        else:
            print_fits(found, run_dir)
        return
    try:
        with taken(paths.path, "export"):
            written = write_export(placement, to, paths.exports, engine=engine, widen=widen, mark=mark)
    except ExportError as error:
        raise explained(error, placement, to, engine, placement_config(paths, []), str(run_dir)) from error
    if as_json:
        machine.tell("export", **machine.exported(run_dir, paths.exports / to, written, placement))
        return
    print_of_older_scores(placement, paths)
    for kind, text in written.remarks:
        say(f"{kind}: {text}", to_stderr=True)
    for name in written.files:
        say(f"# {one_line(path_from_here(paths.exports / to / name))}")
    for flag in written.flags:
        say(flag)
    way_on("report", run_dir)


@command(STEPS)
def report(run_dir: given.RunDirectory) -> None:
    """Write RUN_DIR/report.html: scores, choice, exports and training on one page."""
    from plop_dist.report import closing, write_report
    from plop_dist.rundir.events import working
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.taken import taken
    from plop_dist.values.placement import Placement

    paths = RunDir(run_dir)
    with working("writing the report"), taken(paths.path, "report"):
        write_report(paths)
    if paths.placement.is_file():
        closing.print_of_older_scores(Placement.from_file(paths.placement), paths)
    closing.print_outdated(paths)
    closing.print_files(paths.report)
    way_on("targets", run_dir)


def _scored_modules(path: Path) -> Any:
    """Return the modules of a scores file, None where there is none that can be read."""
    from plop_dist.values.scores import Scores

    with suppress(PlopError):
        return Scores.from_file(path).modules
    return None
