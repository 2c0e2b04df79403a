"""The command line: thin, one function per command; every decision is made below."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from plop_dist.errors import PlopError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. data.num_samples=64")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory with scores.json.")]


@app.command()
def score(config: ConfigFile, overrides: Overrides = None) -> None:
    """Compute the NFN of every linear module; writes RUN_DIR/scores.json."""
    from plop_dist.launch import pipeline
    from plop_dist.report import terminal
    from plop_dist.values.scores import Scores

    loaded = _config(config, overrides)
    pipeline.score(loaded, pipeline.command_line())
    if _speaks():
        terminal.print_types(Scores.from_file(loaded.run_path / "scores.json"))


@app.command()
def place(
    run_dir: RunDirectory,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option(help="Why each type is in or out, and how sure that is.")] = False,
    sweep: Annotated[bool, typer.Option(help="The choice for every k and for fewer samples.")] = False,
) -> None:
    """Choose the LoRA targets from scores.json; writes RUN_DIR/placement.json. Needs no model."""
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.choose.explain import explain as build_explanation
    from plop_dist.choose.place import place as choose
    from plop_dist.choose.sweep import sweep as build_sweep
    from plop_dist.report import terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.values.scores import Scores

    paths = RunDir(run_dir)
    scores = Scores.from_file(paths.scores)
    policy = placement_config(paths, overrides or [])
    placement = choose(scores, policy)
    placement.to_file(paths.placement)
    terminal.print_types(scores, placement)
    if explain:
        terminal.print_explanation(build_explanation(scores, placement))
    if sweep:
        terminal.print_sweep(build_sweep(scores, policy))
    terminal.print_diagnostics(diagnose(scores, placement))
    print(paths.placement)


@app.command()
def export(
    run_dir: RunDirectory,
    to: Annotated[str, typer.Option(help="Target framework.")],
    engine: Annotated[
        str | None, typer.Option(help="fsdp, dtensor, megatron, ... where the target has several.")
    ] = None,
    widen: Annotated[bool, typer.Option(help="Accept the nearest choice that the target can express.")] = False,
) -> None:
    """Write the placement in another framework's own format; prints the flags or overrides to paste."""
    from plop_dist.exporters.write import write_export
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement

    paths = RunDir(run_dir)
    written = write_export(Placement.from_file(paths.placement), to, paths.exports, engine=engine, widen=widen)
    for note in (*written.notes, *(f"widened: {item}" for item in written.widened)):
        print(f"note: {note}", file=sys.stderr)
    for name in written.files:
        print(f"# {paths.exports / to / name}")
    for flag in written.flags:
        print(flag)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Score, place, export, train and report; stages that are done are kept."""
    from plop_dist.launch import pipeline
    from plop_dist.report import terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement

    loaded = _config(config, overrides)
    page = pipeline.run(loaded, pipeline.command_line())
    if _speaks():
        placement = Placement.from_file(loaded.run_path / "placement.json")
        terminal.print_types(placement.source, placement)
        terminal.print_training(RunDir(loaded.run_dir))
        print(page)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Ray dashboard, e.g. http://127.0.0.1:8265.")] = "http://127.0.0.1:8265",
) -> None:
    """Run the configuration as a Ray job on a cluster and follow its log."""
    from plop_dist.registry import missing_extra

    loaded = _config(config, overrides)
    try:
        from plop_dist.launch.jobs import submit_job
    except ModuleNotFoundError as error:
        raise missing_extra(error, "plop-dist submit") from error
    raise typer.Exit(submit_job(loaded, address))


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write RUN_DIR/report.html, one self-contained page."""
    from plop_dist.launch import pipeline

    print(pipeline.report(run_dir))


@app.command()
def diff(
    run_dir: RunDirectory,
    adapter_config: Annotated[Path, typer.Argument(metavar="ADAPTER_CONFIG", help="A PEFT adapter_config.json.")],
) -> None:
    """Show how an existing PEFT configuration differs from the placement."""
    from plop_dist.exporters.diff import diff as compare
    from plop_dist.exporters.diff import read_adapter_config
    from plop_dist.rundir.events import spinner
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(run_dir / "placement.json")
    with spinner("asking PEFT what the configuration adapts"):
        difference = compare(placement, read_adapter_config(adapter_config))
    for line in difference.lines():
        print(line)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate the configuration and show the plan: ranks, modules, bytes, communication. Loads no weights."""
    from plop_dist.rundir.events import spinner

    with spinner("building the model without weights"):
        from plop_dist.costs.plan import build_plan
        from plop_dist.report.cost_tables import print_plan

        plan = build_plan(_config(config, overrides))
    print_plan(plan)


@app.command()
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int, typer.Option(help="Also measure communication and weak scaling up to this many ranks.", min=1)
    ] = 1,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions of every variant.", min=1)] = 5,
) -> None:
    """Measure the cost of scoring against a plain forward pass and against the algorithm of the paper's own script."""
    from plop_dist.costs.bench import run_bench
    from plop_dist.report.cost_tables import print_bench

    print_bench(run_bench(_config(config, overrides), ranks=ranks, repeats=repeats))


def _config(path: Path, overrides: list[str] | None) -> Any:
    from plop_dist.config.loading import load_config

    return load_config(path, overrides or [])


def _speaks() -> bool:
    """Tell whether this process prints results: under a launcher only rank 0 does."""
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("plop_dist").setLevel(logging.INFO)
    try:
        app()  # ends in SystemExit: 0, typer's own 2 for wrong usage, 130 and 143 after SIGINT and SIGTERM
    except PlopError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(error.exit_status)
    except SystemExit as stop:
        if stop.code in (130, 143):
            print("interrupted; the same command goes on from what is on disk", file=sys.stderr)
        _leave(int(stop.code or 0))
    except OSError as error:  # standard output is on a full disk
        print(f"error: {error}", file=sys.stderr)
        _leave(1)


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            if stream is not None:  # it is None where the caller has closed it
                stream.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # After a failure peers may still wait in a collective with this rank; the launcher ends them once it sees this
        # exit. After success gloo's threads, which outlive its groups, may abort the interpreter's own end.
        if not status:
            atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
